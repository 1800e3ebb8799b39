//! Negative controls: faults planted into the kernels' sources must be caught by the same checks
//! that the right kernels pass, each by at least one schedule.

use crate::attention::{Decode, Packed};
use crate::common::*;
use crate::layernorm::LayerNorm;
use crate::lora::{Adapted, fused};
use crate::matrix::Product;
use crate::rmsnorm::Norm;
use crate::t5_attention::Short;
use gradtx_emulator::{Order, Plant, Schedule, Variant, device};
use gradtx_kernels::bf16;
use gradtx_kernels::ops::Out;

/// What every schedule says of a case with this fault: nothing, or what is wrong.
fn complaints(case: &impl Case, plant: Plant) -> Vec<String> {
    let plain = device(Variant { race: false, plant: Some(plant) });
    let watched = device(Variant { race: true, plant: Some(plant) });
    let schedules = SCHEDULES.into_iter().chain([Schedule { order: Order::Random(9), race: false }]);
    let run = |schedule: Schedule| {
        let cuda = if schedule.race { &watched } else { &plain };
        attempt::<bf16>(case, cuda, schedule, Precision::Bf16, 1e-2).err()
    };
    schedules.filter_map(run).collect()
}

/// Fails unless some complaint contains these words.
fn expect_caught(case: &impl Case, plant: Plant, words: &str) {
    let found = complaints(case, plant);
    assert!(found.iter().any(|c| c.contains(words)), "{plant:?}: expected `{words}`, found {found:#?}");
}

fn norm() -> Norm {
    Norm { rows: 5, cols: 1030, gap: 0, out: Out::Assign }
}

fn product() -> Product {
    Product::new(70, 66, 136, (false, true), 0, Out::Assign)
}

/// A fault in a module's own file.
const fn plant(file: &'static str, text: &'static str, instead: &'static str) -> Plant {
    Plant { module: file, file, text, instead }
}

/// A fault in what the norm takes from the common header.
const fn in_common(text: &'static str, instead: &'static str) -> Plant {
    Plant { module: "rmsnorm.cu", file: "common.cuh", text, instead }
}

/// A fault in a header of the products with A: `forward`, `backward` or `pair`.
const fn in_rows(file: &'static str, text: &'static str, instead: &'static str) -> Plant {
    Plant { module: "lora_rows.cu", file, text, instead }
}

#[test]
fn the_cases_pass_without_faults() {
    let none = plant("rmsnorm.cu", "// RMS layer norm", "// RMS layer norm");
    assert_eq!(complaints(&norm(), none), [""; 0]);
    let none = plant("gemm.cu", "// Matrix products", "// Matrix products");
    assert_eq!(complaints(&product(), none), [""; 0]);
    let none = plant("lora_rows.cu", "// Entry points", "// Entry points");
    assert_eq!(complaints(&adapted(), none), [""; 0]);
}

/// A block sum that does not wait for the other warps' parts.
#[test]
fn dropped_barrier() {
    let fault = in_common("    __syncthreads();\n    x = warp_sum(lane <", "    x = warp_sum(lane <");
    expect_caught(&norm(), fault, "that nobody has written");
    expect_caught(&norm(), fault, "relative error");
}

/// A variance about 0, a gradient without its mean, and sums over rows that are not centred.
#[test]
fn wrong_layer_norm() {
    let case = LayerNorm { rows: 37, cols: 70, gap: 0, out: Out::Add };
    let none = plant("layernorm.cu", "// Layer norm", "// Layer norm");
    assert_eq!(complaints(&case, none), [""; 0]);
    for (text, instead, words) in [
        ("fmaf(xs[j] - mean, xs[j] - mean, squares)", "fmaf(xs[j], xs[j], squares)", "`y`"),
        ("(ws[j] * ds[j] - of_g - ", "(ws[j] * ds[j] - ", "`dx`"),
        ("(widen(x[r * x_stride + c]) - stats[r])", "widen(x[r * x_stride + c])", "`dw`"),
    ] {
        expect_caught(&case, plant("layernorm.cu", text, instead), words);
    }
}

/// Two sums in a row through the same array: right with the barrier that ends each, a race without.
#[test]
fn write_after_read() {
    const END: &str = "    __syncthreads();  // the next call writes to the same array\n    return x;\n}\n";
    const TWICE_RIGHT: &str = "    __syncthreads();\n    return x;\n}\n\
        DEV float sum_twice(float x) { return 0.25f * (block_sum(x) + block_sum(3.f * x)); }\n\
        #define block_sum sum_twice\n";
    const TWICE_WRONG: &str = "    return x;\n}\n\
        DEV float sum_twice(float x) { return 0.25f * (block_sum(x) + block_sum(3.f * x)); }\n\
        #define block_sum sum_twice\n";
    assert_eq!(complaints(&norm(), in_common(END, TWICE_RIGHT)), [""; 0]);
    expect_caught(&norm(), in_common(END, TWICE_WRONG), "data race");
    expect_caught(&norm(), in_common(END, TWICE_WRONG), "relative error");
}

/// A tile that is used before its copies have arrived.
#[test]
fn dropped_wait() {
    let fault = plant("gemm.cu", "        cp_async_wait<STAGES - 2>();\n", "");
    assert!(!complaints(&product(), fault).is_empty());
    expect_caught(&product(), fault, "relative error");
    // Without any wait the last copies never arrive.
    const NONE: &str = "#include \"common.cuh\"\n#define cp_async_wait no_wait\n\
        template <int pending> DEV void no_wait() {}\n";
    expect_caught(&product(), plant("gemm.cu", "#include \"common.cuh\"\n", NONE), "nobody waited for");
}

/// A wait for one group too few: everything arrives in the end, but too late.
#[test]
fn wait_too_short() {
    let fault = plant("gemm.cu", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>");
    assert!(!complaints(&product(), fault).is_empty());
}

/// A stage that is refilled while others still read it.
#[test]
fn refilled_too_early() {
    let fault = plant(
        "gemm.cu",
        "        __syncthreads();  // this step's tile is there for all, and nobody reads the one refilled next\n",
        "",
    );
    expect_caught(&product(), fault, "that nobody has written");
}

#[test]
fn swapped_arguments() {
    let fault = plant("gemm.cu", "*c, const X *a, const X *b,", "*c, const X *b, const X *a,");
    assert_eq!(complaints(&product(), fault).len(), SCHEDULES.len() + 1);
    let fault = plant("rmsnorm.cu", "X* dx, const X* dy, const X* x,", "X* dx, const X* x, const X* dy,");
    expect_caught(&norm(), fault, "`dx`");
}

/// One element more than the row has.
#[test]
fn off_by_one() {
    let fault = in_common("for (u64 i = body + worker; i < n;", "for (u64 i = body + worker; i <= n;");
    let last_row = Norm { rows: 1, cols: 1032, gap: 0, out: Out::Assign };
    let found = complaints(&last_row, fault);
    assert!(!found.is_empty(), "one element too many went unnoticed");
    let fault = plant("gemm.cu", "if (column + j >= n) return;", "if (column + j > n) return;");
    let odd = Product::new(33, 65, 40, (false, true), 0, Out::Assign);
    expect_caught(&odd, fault, "relative error");
    let fault = plant("gemm.cu", "if (row >= m) return;", "if (row > m) return;");
    expect_caught(&odd, fault, "illegal memory access");
}

/// Attention that sees one key too few, one too many, or a neighbour's.
#[test]
fn wrong_visibility() {
    let case = Packed { lengths: &[5, 70, 3], heads: 2, kv_heads: 1, head_dim: 64, gap: 0 };
    let forward = "if (key > query + edge)";
    let backward = "whole || key <= query ?";
    for (text, instead) in [
        (forward, "if (key >= query + edge)"),
        (forward, "if (false)"),
        (backward, "whole || key < query ?"),
        (backward, "true ?"),
    ] {
        let file = if text == forward { "flash.cuh" } else { "flash.cu" };
        let fault = Plant { module: "flash.cu", file, text, instead };
        assert_eq!(complaints(&case, fault).len(), SCHEDULES.len() + 1, "{instead}");
    }
}

/// Hopper's kernels: visibility, products that are read before they are there, that others' rows are multiplied
/// with, and tiles that are overwritten while they are multiplied.
#[test]
fn wrong_products_on_hopper() {
    let _hopper = crate::attention::Hopper::new();
    let case = Packed { lengths: &[150], heads: 1, kv_heads: 1, head_dim: 128, gap: 0 };
    let none = plant("flash_hopper.cu", "// ---- forward", "// ---- forward");
    assert_eq!(complaints(&case, none), [""; 0]);
    for (text, instead, words) in [
        ("(step + 1) * STEP > first_query + 1", "false", "`o`"),
        ("tile_first / STEP + 1", "tile_first / STEP", "nobody waited for"),
        ("        wgmma_wait<1 - M>();\n", "", "`o`"),
        ("query_tile.further(m * TILE)", "query_tile", "`o`"),
        ("c % 8 ^ r", "c % 8", "`o`"),
        ("step % 2 * FORWARD_STAGE;\n        load_tile", "0;\n        load_tile", "data race"),
        ("bool whole = step + 1 < steps;", "bool whole = true;", "`dqkv`"),
        ("begin_sums(dv, packed_p, d_out);", "begin_sums(dv, packed_p, queries);", "`dqkv`"),
        ("bool diagonal = first == 0;", "bool diagonal = false;", "`dqkv`"),
    ] {
        expect_caught(&case, plant("flash_hopper.cu", text, instead), words);
    }
}

/// Tiles that are computed twice, others not at all.
#[test]
fn tiles_in_the_wrong_order() {
    let case = Packed { lengths: &[5, 140, 3], heads: 1, kv_heads: 1, head_dim: 64, gap: 0 };
    for text in ["    tile -= before;\n", "            before = count;\n"] {
        let fault = Plant { module: "flash.cu", file: "packed.cuh", text, instead: "" };
        assert_eq!(complaints(&case, fault).len(), SCHEDULES.len() + 1, "{text}");
    }
}

/// Sums of other queries: those of a step are not copied.
#[test]
fn dropped_copy() {
    let case = Packed { lengths: &[70], heads: 1, kv_heads: 1, head_dim: 64, gap: 0 };
    let fault =
        plant("flash.cu", "cp_async4(to.lse + threadIdx.x", "if (stage & 1) cp_async4(to.lse + threadIdx.x");
    assert_eq!(complaints(&case, fault).len(), SCHEDULES.len() + 1);
    // Words of 4 bytes, but not on their boundaries.
    let instead = "cp_async4(reinterpret_cast<bf16*>(to.lse) + 1 + threadIdx.x";
    let fault = plant("flash.cu", "cp_async4(to.lse + threadIdx.x", instead);
    expect_caught(&case, fault, "not 4-byte aligned");
}

/// T5 attention on the tensor cores: masks of other rows, a table without some of its gradient, values in
/// the order of memory, and probabilities that are read before their warps have put them there.
#[test]
fn wrong_t5_tiles() {
    let case = Short {
        batch: 2,
        queries: 20,
        keys: 37,
        heads: 2,
        head_dim: 64,
        causal: false,
        bias: true,
        dropout: 0.3,
        shift: 0,
    };
    let none = plant("t5_tiles.cu", "// ---- forward", "// ---- forward");
    assert_eq!(complaints(&case, none), [""; 0]);
    for (text, instead, words) in [
        ("make_uint4(blockIdx.y * shape.queries + row", "make_uint4(row", "`o`"),
        ("u32 seen = row < shape.queries", "u32 seen = row < 16", "`d_table`"),
        ("load_rows<true>(values, k + width", "load_rows<false>(values, k + width", "`o`"),
        ("    __syncthreads();  // queries and keys are there, and", "    // and", "`dq`"),
    ] {
        expect_caught(&case, plant("t5_tiles.cu", text, instead), words);
    }
}

/// Keys and values that come in where others are still read.
#[test]
fn overwritten_stage() {
    let case = Packed { lengths: &[150], heads: 1, kv_heads: 1, head_dim: 64, gap: 0 };
    let fault = plant("flash.cu", "stages + (step + 1) % STAGES", "stages + step % STAGES");
    expect_caught(&case, fault, "data race");
    expect_caught(&case, fault, "relative error");
}

/// Results that leave before all lanes have put their part into shared memory.
#[test]
fn dropped_warp_barrier() {
    let case = Packed { lengths: &[70], heads: 1, kv_heads: 1, head_dim: 64, gap: 0 };
    const TEXT: &str = "    __syncwarp();\n    constexpr int CHUNKS";
    let instead = "    constexpr int CHUNKS";
    let fault = Plant { module: "flash.cu", file: "flash.cuh", text: TEXT, instead };
    expect_caught(&case, fault, "data race");
    expect_caught(&case, fault, "relative error");
}

/// Decoding with the newest key from the cache, which does not have it yet, with parts that are left out or
/// not weighed, and with a stage that is refilled while it is read.
#[test]
fn wrong_decoding() {
    let case = Decode { lengths: &[523, 70], heads: 2, kv_heads: 1, head_dim: 64, capacity: 530 };
    let none = plant("decode.cu", "// What a warp has found", "// What a warp has found");
    assert_eq!(complaints(&case, none), [""; 0]);
    for (text, instead, words) in [
        ("key < position ? cached + key * stride : newest", "cached + key * stride", "`o`"),
        ("part > newest / PART", "part >= max(newest / PART, 1u)", "`k`"),
        ("float factor = exp2_fast(from[D] - top)", "float factor = 1.f", "`o`"),
        ("        cp_async_wait<1>();\n", "", "`o`"),
    ] {
        expect_caught(&case, plant("decode.cu", text, instead), words);
    }
}

/// Lanes that take different ways to a collective.
#[test]
fn diverged_warp() {
    let fault = in_common(
        "    x = warp_sum(lane < (int)(blockDim.x >> 5) ?",
        "    if (threadIdx.x != 3) x = warp_sum(lane < (int)(blockDim.x >> 5) ?",
    );
    expect_caught(&norm(), fault, "not all threads reach");
}

/// Two adapters of two targets, the first with more tokens than a tile of either backward kernel has.
fn adapted() -> Adapted {
    Adapted { segments: &[(70, 1, 0), (3, 0, 1)], ..fused(0, (40, 24, 2, 2), 0.3) }
}

/// Columns of other adapters that are not zeroed, and the B of one adapter in the columns of all.
#[test]
fn wrong_columns_of_adapters() {
    let fault = in_rows("lora_rows_forward.cuh", "if (column >= own && column < own", "if (column < own");
    expect_caught(&adapted(), fault, "`y`");
    let fault = plant("lora.cu", "target = 0, adapter++;", "target = 0;");
    expect_caught(&adapted(), fault, "relative error");
}

/// The same of a rank that the backward kernel for rows in steps does not take.
fn adapted_of_rank_3() -> Adapted {
    Adapted { segments: &[(70, 1, 0), (3, 0, 1)], ..fused(0, (40, 24, 3, 2), 0.3) }
}

/// A mask that counts positions from the tile instead of the segment.
#[test]
fn wrong_mask_of_later_tiles() {
    let fault = in_rows("lora_rows_pair.cuh", "MaskRow::of(key, tile.first + t,", "MaskRow::of(key, t,");
    expect_caught(&adapted(), fault, "`dx`");
    let fault = in_rows(
        "lora_rows_backward.cuh",
        "kept_bits<N>(mask, tile.first + t + r,",
        "kept_bits<N>(mask, t + r,",
    );
    expect_caught(&adapted_of_rank_3(), fault, "`dx`");
}

/// Rows of a step that are used before their copies have arrived, sums of the next step that are not waited for,
/// and a step that is asked for into the place of another.
#[test]
fn rows_that_are_still_on_their_way() {
    let fault = in_rows("lora_rows_pair.cuh", "cp_async_wait<PAIR_STAGES - 1>", "cp_async_wait<PAIR_STAGES>");
    assert!(!complaints(&adapted(), fault).is_empty());
    let text = "            stage = next;\n            __syncthreads();\n";
    let fault = in_rows("lora_rows_pair.cuh", text, "            stage = next;\n");
    // Rows of several warps, whose sums belong together.
    expect_caught(&fused(3, (520, 24, 2, 2), 0.3), fault, "that nobody has written");
    let text = "pair.ask(t + stages * PAIR_ROWS, stage)";
    let fault = in_rows("lora_rows_pair.cuh", text, "pair.ask(t + stages * PAIR_ROWS, next)");
    assert!(!complaints(&adapted(), fault).is_empty());
}

/// ds that is read before others have put it there.
#[test]
fn dropped_barrier_before_ds() {
    let text = "    __syncthreads();\n    for (u32 t = 0; t < tokens; t += TILE_ROWS) {";
    let fault = in_rows("lora_rows_backward.cuh", text, text.trim_start_matches("    __syncthreads();\n"));
    expect_caught(&Adapted { norm: false, ..adapted() }, fault, "that nobody has written");
}

/// The norm's backward without what the adapters add to its mean.
#[test]
fn mean_without_adapters() {
    let fault = in_rows("lora_rows_pair.cuh", "total * inv[r] + shared->ds_dot_s[t + r]", "total * inv[r]");
    assert_eq!(complaints(&adapted(), fault).len(), SCHEDULES.len() + 1);
    let fault = in_rows("lora_rows_backward.cuh", "w_d_x[r] * scale + ds_dot_s[t + r]", "w_d_x[r] * scale");
    assert_eq!(complaints(&adapted_of_rank_3(), fault).len(), SCHEDULES.len() + 1);
}

/// Tiles of a segment that are left out, or added to another segment's row.
#[test]
fn wrong_sums_of_tiles() {
    let fault = plant("lora.cu", "tile < tiles; tile++", "tile + 1 < tiles; tile++");
    expect_caught(&adapted(), fault, "`grads`");
    let fault = plant("lora.cu", "before + __shfl_sync(ALL, scan - mine, group + warp)", "before");
    expect_caught(&adapted(), fault, "`grads`");
}
