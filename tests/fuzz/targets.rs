//! What is read by what: every parser of the program, by the commands that reach it.

use crate::mutate::Form;

/// A file that is mutated, and a command that reads it.
pub struct Target {
    /// Its name, also in the names of saved inputs.
    pub name: &'static str,
    /// What mutations know about it.
    pub form: Form,
    /// Files to start from, in the home directory; `*` in the last name: the first that fits.
    pub seeds: &'static [&'static str],
    /// Where the input is put.
    pub place: &'static str,
    /// The command; empty: the input is the command.
    pub command: &'static str,
    /// Directories that are made again before each input.
    pub fresh: &'static [&'static str],
    /// Inputs of it among a hundred of an average target.
    pub share: usize,
}

const fn target(
    name: &'static str,
    form: Form,
    seeds: &'static [&'static str],
    place: &'static str,
    command: &'static str,
) -> Target {
    Target { name, form, seeds, place, command, fresh: &[], share: 100 }
}

impl Target {
    const fn fresh(self, fresh: &'static [&'static str]) -> Self {
        Self { fresh, ..self }
    }

    const fn share(self, share: usize) -> Self {
        Self { share, ..self }
    }
}

const CONFIGS: &[&str] = &[
    "model/config.json",
    "llm/config.json",
    "configs/llama.json",
    "configs/mistral.json",
    "configs/qwen3.json",
    "world/llm/config.json",
];
const UPDATE: &str = "run/clients/client-1/finetuned/tiny/update.safetensors";
const ROWS: &[&str] = &[
    "rows/pair.jsonl",
    "rows/chat.jsonl",
    "rows/alpaca.jsonl",
    "rows/preferences.jsonl",
    "rows/parts.jsonl",
    "parquet/gsm8k.jsonl",
    "parquet/aqua_rat.jsonl",
    "parquet/commonsense_qa.jsonl",
    "parquet/dialogsum.jsonl",
];
const TABLES: &[&str] = &[
    "parquet/plain.parquet",
    "parquet/snappy.parquet",
    "parquet/gzip.parquet",
    "parquet/zstd.parquet",
    "parquet/dictionary.parquet",
    "parquet/delta.parquet",
    "parquet/pages.parquet",
    "parquet/row_groups.parquet",
    "parquet/lz4.parquet",
    "parquet/brotli.parquet",
    "parquet/gsm8k.parquet",
    "parquet/drop.parquet",
    "world/public/train-00000-of-00001.parquet",
];
const EVALUATE: &str = "evaluate --run run --base model --data one.jsonl --out out";
const TRANSLATE: &str =
    "translate --run run run/clients/client-1/finetuned/tiny/update.safetensors --out out";
const NEAREST: &str =
    "translate --run run run/clients/client-1/finetuned/tiny/update.safetensors --method nearest --out out";
const FINETUNE: &str = "finetune --run rows_run --config rows.toml --data d.jsonl --out out";
const PLAN: &str = "plan --config world/fuzz.toml --gpu cpu --tokens-per-example 100";

/// A private client, whose cost and checkpoint are with its result.
pub const PRIVATE: &str =
    "finetune --run package --set models.tiny=world/tiny --data private.jsonl --out private";

use Form::{Bytes, Json, JsonLines, Template, Tensors, Text, Toml, Words};

/// All targets.
pub const TARGETS: &[Target] = &[
    target("run_file-plan", Toml, &["world/settings.toml", "run/run.toml"], "world/fuzz.toml", PLAN)
        .share(200),
    target(
        "run_file-doctor",
        Toml,
        &["world/settings.toml", "run/run.toml"],
        "world/fuzz.toml",
        "doctor --run world/fuzz.toml",
    )
    .share(50),
    target("run_file-of_a_run", Toml, &["run/run.toml"], "run/run.toml", "status run").share(50),
    target(
        "sweep_file-sweep",
        Toml,
        &["world/sweep.toml"],
        "world/sweep.toml",
        "sweep --list --out out world/sweep.toml",
    ),
    target(
        "sweep_file-plan",
        Toml,
        &["world/sweep.toml"],
        "world/sweep.toml",
        "plan --sweep world/sweep.toml --gpu cpu --tokens-per-example 100",
    ),
    target("config-inspect", Json, CONFIGS, "model/config.json", "inspect model").share(200),
    target("config-doctor", Json, CONFIGS, "model/config.json", "doctor --model model").share(150),
    target("config-evaluate", Json, &["model/config.json"], "model/config.json", EVALUATE),
    target(
        "generation_config",
        Json,
        &["model/generation_config.json"],
        "model/generation_config.json",
        EVALUATE,
    ),
    target(
        "tokenizer",
        Json,
        &["model/tokenizer.json", "world/tiny/tokenizer.json"],
        "model/tokenizer.json",
        EVALUATE,
    )
    .share(200),
    target(
        "tokenizer_config",
        Json,
        &["model/tokenizer_config.json", "world/tiny/tokenizer_config.json"],
        "model/tokenizer_config.json",
        EVALUATE,
    ),
    target(
        "template",
        Template,
        &["model/chat_template.jinja", "templates/tools.jinja"],
        "model/chat_template.jinja",
        EVALUATE,
    )
    .share(300),
    target(
        "model-inspect",
        Tensors,
        &["model/model.safetensors"],
        "model/model.safetensors",
        "inspect model",
    ),
    target("model-evaluate", Tensors, &["model/model.safetensors"], "model/model.safetensors", EVALUATE),
    target(
        "index",
        Json,
        &["sharded/model.safetensors.index.json"],
        "sharded/model.safetensors.index.json",
        "inspect sharded",
    ),
    target(
        "adapter_config-inspect",
        Json,
        &["adapter/adapter_config.json"],
        "adapter/adapter_config.json",
        "inspect adapter",
    ),
    target(
        "adapter_config-evaluate",
        Json,
        &["adapter/adapter_config.json"],
        "adapter/adapter_config.json",
        "evaluate --run run --base model --adapter adapter --data one.jsonl --out out",
    ),
    target(
        "adapter-inspect",
        Tensors,
        &["adapter/adapter_model.safetensors"],
        "adapter/adapter_model.safetensors",
        "inspect adapter",
    ),
    target(
        "adapter-evaluate",
        Tensors,
        &["adapter/adapter_model.safetensors"],
        "adapter/adapter_model.safetensors",
        "evaluate --run run --base model --adapter adapter --data one.jsonl --out out",
    ),
    target(
        "tensors-inspect",
        Tensors,
        &[
            UPDATE,
            "run/shadow/init/student.safetensors",
            "run/shadow/shards/00000.student.safetensors",
            "run/translator/normalization.safetensors",
            "half/translator/checkpoints/*.safetensors",
        ],
        "t.safetensors",
        "inspect t.safetensors",
    )
    .share(200),
    target(
        "update-translate",
        Tensors,
        &[UPDATE],
        "u.safetensors",
        "translate --run run u.safetensors --method mean --out out",
    ),
    target(
        "shard-inspect",
        Tensors,
        &["run/shadow/shards/00000.student.safetensors"],
        "run/shadow/shards/00000.student.safetensors",
        "inspect run/shadow",
    ),
    target(
        "shard-translate",
        Tensors,
        &["run/shadow/shards/00000.teacher.safetensors"],
        "run/shadow/shards/00000.teacher.safetensors",
        NEAREST,
    ),
    target(
        "shard-train",
        Tensors,
        &["run/shadow/shards/00000.student.safetensors"],
        "run/shadow/shards/00000.student.safetensors",
        "train --run run",
    )
    .fresh(&["run/translator"])
    .share(40),
    target(
        "initial_adapter",
        Tensors,
        &["run/shadow/init/teacher.safetensors"],
        "run/shadow/init/teacher.safetensors",
        NEAREST,
    ),
    target(
        "normalization",
        Tensors,
        &["run/translator/normalization.safetensors"],
        "run/translator/normalization.safetensors",
        TRANSLATE,
    ),
    target(
        "translator-translate",
        Tensors,
        &["run/translator/model.safetensors"],
        "run/translator/model.safetensors",
        TRANSLATE,
    )
    .share(50),
    target(
        "translator_config-translate",
        Json,
        &["run/translator/config.json"],
        "run/translator/config.json",
        TRANSLATE,
    ),
    target(
        "translator_config-inspect",
        Json,
        &["run/translator/config.json"],
        "run/translator/config.json",
        "inspect run/translator",
    )
    .share(150),
    target(
        "checkpoint",
        Tensors,
        &["half/translator/checkpoints/*.safetensors"],
        "half/translator/checkpoints/*.safetensors",
        "train --run half",
    )
    .fresh(&["half/translator"])
    .share(30),
    target(
        "manifest-inspect",
        Json,
        &["run/shadow/manifest.json"],
        "run/shadow/manifest.json",
        "inspect run/shadow",
    ),
    target("manifest-translate", Json, &["run/shadow/manifest.json"], "run/shadow/manifest.json", NEAREST),
    target(
        "manifest-train",
        Json,
        &["run/shadow/manifest.json"],
        "run/shadow/manifest.json",
        "train --run run",
    )
    .fresh(&["run/translator"])
    .share(40),
    target(
        "record-status",
        Json,
        &["run/shadow/record.json", "run/translator/record.json"],
        "run/shadow/record.json",
        "status --verify run",
    ),
    target("record-curate", Json, &["run/shadow/record.json"], "run/shadow/record.json", "curate --run run")
        .fresh(&["run/shadow"])
        .share(50),
    target(
        "record-inspect",
        Json,
        &["run/translator/record.json"],
        "run/translator/record.json",
        "inspect run",
    ),
    target(
        "progress",
        Json,
        &["half/translator/progress.json"],
        "run/translator/progress.json",
        "status run",
    ),
    target("failed", Json, &["failed.json"], "run/translator/failed.json", "status run"),
    target(
        "score",
        Json,
        &["run/clients/client-1/evaluated/mean/score.json"],
        "run/clients/client-1/evaluated/mean/score.json",
        "report --run run --out out.html",
    ),
    target(
        "metrics",
        JsonLines,
        &["run/translator/metrics.jsonl", "run/translator/throughput.jsonl"],
        "run/translator/metrics.jsonl",
        "report --run run --out out.html",
    ),
    target(
        "metrics-status",
        JsonLines,
        &["run/translator/metrics.jsonl"],
        "run/translator/metrics.jsonl",
        "status run",
    ),
    target(
        "validation",
        Json,
        &["run/translator/validation.json"],
        "run/translator/validation.json",
        "report --run run --out out.html",
    ),
    target(
        "subsets",
        Json,
        &["run/shadow/subsets.json"],
        "run/shadow/subsets.json",
        "report --run run --out out.html",
    ),
    target(
        "split_manifest",
        Json,
        &["split/split.json"],
        "split/split.json",
        "report --run run --scores split --out out.html",
    ),
    target("jsonl-split", JsonLines, ROWS, "d.jsonl", "split --data d.jsonl --out out --clients 1")
        .share(250),
    target("jsonl-finetune", JsonLines, ROWS, "d.jsonl", FINETUNE).share(50),
    target(
        "json-split",
        Json,
        &[
            "rows/list.json",
            "rows/sharegpt.json",
            "rows/envelope.json",
            "parquet/drop.json",
            "parquet/samsum.json",
        ],
        "d.json",
        "split --data d.json --out out --clients 1",
    ),
    target("data-inspect", JsonLines, ROWS, "d.jsonl", "inspect d.jsonl").share(50),
    target("parquet-split", Bytes, TABLES, "d.parquet", "split --data d.parquet --out out --clients 1")
        .share(300),
    target("csv-split", Text, &["rows/rows.csv"], "d.csv", "split --data d.csv --out out --clients 1"),
    target(
        "gzip-split",
        Bytes,
        &["rows/rows.jsonl.gz"],
        "d.jsonl.gz",
        "split --data d.jsonl.gz --out out --clients 1",
    ),
    target(
        "zstd-split",
        Bytes,
        &["rows/rows.jsonl.zst"],
        "d.jsonl.zst",
        "split --data d.jsonl.zst --out out --clients 1",
    ),
    target("package-inspect", Json, &["package/package.json"], "package/package.json", "inspect package"),
    target(
        "package-finetune",
        Json,
        &["package/package.json"],
        "package/package.json",
        "finetune --run package --data private.jsonl --out out",
    )
    .share(50),
    target(
        "package_run_file",
        Toml,
        &["package/run.toml"],
        "package/run.toml",
        "finetune --run package --data private.jsonl --out out",
    )
    .share(50),
    target(
        "canary_key",
        Json,
        &["key.json"],
        "key.json",
        "audit --run package --update client/update.safetensors --key key.json",
    ),
    target(
        "privacy_ledger",
        JsonLines,
        &["private/privacy-ledger.jsonl"],
        "private/privacy-ledger.jsonl",
        PRIVATE,
    )
    .fresh(&["private"])
    .share(50),
    target(
        "private_checkpoint",
        Tensors,
        &["private/checkpoint.safetensors"],
        "private/checkpoint.safetensors",
        PRIVATE,
    )
    .fresh(&["private"])
    .share(50),
    target(
        "convert-adapter",
        Tensors,
        &["client/adapter/adapter_model.safetensors"],
        "client/adapter/adapter_model.safetensors",
        "convert --run package --adapter client/adapter --examples 7 --out out",
    ),
    target(
        "convert-config",
        Json,
        &["client/adapter/adapter_config.json"],
        "client/adapter/adapter_config.json",
        "convert --run package --adapter client/adapter --examples 7 --out out",
    ),
    target(
        "layers-plugin",
        Tensors,
        &["edge/layers.safetensors"],
        "layers.safetensors",
        "plugin --run offsite --adapter layers.safetensors --out out",
    ),
    target(
        "layers-merge",
        Tensors,
        &["edge/layers.safetensors"],
        "layers.safetensors",
        "merge --run offsite-client --model tiny --adapter layers.safetensors --out out",
    )
    .share(50),
    target(
        "emulator_config-plugin",
        Json,
        &["offsite/emulator/model/config.json"],
        "offsite/emulator/model/config.json",
        "plugin --run offsite --adapter edge --emulator offsite/emulator/model --out out",
    ),
    target(
        "clients",
        Json,
        &["run/several/clients.json"],
        "run/several/clients.json",
        "report --run run --scores run/several --out out.html",
    ),
    target(
        "bench_results",
        JsonLines,
        &["bench.jsonl"],
        "bench.jsonl",
        "plan --config world/settings.toml --gpu cpu --tokens-per-example 100 --calibrate bench.jsonl",
    ),
    target(
        "command_line",
        Words,
        &["words/inspect", "words/plan", "words/evaluate", "words/split"],
        "words/now",
        "",
    )
    .share(300),
];

/// The number of inputs of a target when all have `total` together.
pub fn inputs_of(target: &Target, total: usize) -> usize {
    let shares: usize = TARGETS.iter().map(|target| target.share).sum();
    (total * target.share).div_ceil(shares)
}
