//! The published data sets, in the columns of the hub and of their original releases:
//! what a model reads and what it learns, byte for byte.

use crate::fixture;
use gradtx_runtime::data::{
    Content, Format, Instruction, Metric, Reading, Record, Schema, data_files, read_rows,
};
use std::path::Path;

const LETTER: &str =
    "Let's think step by step and write only the choice letter in the format '#### {answer}'\n";
const AT_THE_END: &str =
    "Let's think step by step and write your answer at the end in the format '#### {answer}'\n";
const CAPITAL: &str = "Answer only the choice letter in capital letter in the format: '#### {answer}'.\n";
const SPAN: &str = "Let's think step by step and write the answer in the format '#### {answer}'\n";
const SUMMARY: &str = "Summarize the following dialogue.\n";

/// Schema, instruction, and question and answer of every row.
type Wanted = (Schema, &'static str, &'static [(&'static str, &'static str)]);

const WANTED: [Wanted; 6] = [
    (
        Schema::AquaRat,
        LETTER,
        &[
            (
                "A shop sells 3 pens for $2. What do 12 pens cost?\nWhich of the following options is correct?\n\
                 A)$6\nB)$8\nC)$9\nD)$10\nE)None of these",
                "12 pens are 4 times 3 pens.\n4 * 2 = 8\n#### B",
            ),
            (
                "x + 4 = 9, x = ?\nWhich of the following options is correct?\nA)3\nB)4\nC)5\nD)6\nE)7",
                "x = 9 – 4\n#### C",
            ),
        ],
    ),
    (
        Schema::Gsm8k,
        AT_THE_END,
        &[
            (
                "Ada reads 14 pages a day. How many does she read in 3 weeks?",
                "3 weeks are 3*7=<<3*7=21>>21 days.\n14*21=<<14*21=294>>294 pages.\n#### 294",
            ),
            ("What is half of 1,000?", "1000/2=<<1000/2=500>>500\n#### 500"),
        ],
    ),
    (
        Schema::CommonsenseQa,
        CAPITAL,
        &[
            (
                "Where would you leave a wet umbrella?\nA. bed\nB. stand\nC. cake\nD. piano\nE. letter",
                "#### B",
            ),
            ("What do bees make?\nA. glass\nB. wool\nC. honey\nD. salt\nE. paper", "#### C"),
        ],
    ),
    (
        Schema::Drop,
        SPAN,
        &[
            (
                "The home team led by 3, then by 10. It won 24 to 14.\nHow many points did the winner score?",
                "#### 24",
            ),
            ("The home team led by 3, then by 10. It won 24 to 14.\nWhich leads are named?", "#### 3"),
            ("The bridge was opened on 3 May 1887.\nWhen was it opened?", "#### 3 May 1887"),
        ],
    ),
    (
        Schema::Samsum,
        SUMMARY,
        &[
            ("Ann: tea?\r\nBo: yes pls :)\r\nAnn: 5 min", "Ann makes tea for Bo."),
            ("Cy: where r u\r\nDi: train late", "Di's train is late."),
        ],
    ),
    (
        Schema::Dialogsum,
        SUMMARY,
        &[
            (
                "#Person1#: Is this seat taken?\n#Person2#: No, please sit down.",
                "#Person1# takes a free seat.",
            ),
            ("#Person1#: How much is it?\n#Person2#: Nine euros.", "#Person2# tells #Person1# a price."),
        ],
    ),
];

fn records(path: &Path, reading: &Reading) -> Vec<Record> {
    read_rows(path).unwrap().into_iter().map(|row| reading.record(row).unwrap()).collect()
}

/// True if the records are what is wanted.
fn matches(records: &[Record], wanted: &Wanted, instruction: &str) -> bool {
    let (schema, _, pairs) = wanted;
    let same = |(record, (question, answer)): (&Record, &(&str, &str))| {
        let prompt = format!("{instruction}{question}");
        record.schema == *schema && record.content == Content::Pair { prompt, response: answer.to_string() }
    };
    records.len() == pairs.len() && records.iter().zip(*pairs).all(same)
}

#[test]
fn questions_and_answers_are_byte_for_byte() {
    let files = data_files(&[fixture("tasks")]).unwrap();
    for wanted in &WANTED {
        let (schema, published, _) = *wanted;
        let of_task: Vec<_> = files.iter().filter(|f| f.file_stem().unwrap() == schema.name()).collect();
        assert_eq!(of_task.len(), 2, "{}: hub and original", schema.name());
        for path in of_task {
            let named = Reading { format: Format(Some(schema)), ..Reading::default() };
            for reading in [Reading::default(), named] {
                let found = records(path, &reading);
                assert!(matches(&found, wanted, published), "{}: {found:#?}", path.display());
            }
            let bare = Reading { instruction: Instruction::None, ..Reading::default() };
            assert!(matches(&records(path, &bare), wanted, ""), "{}", path.display());
            // What must not match does not.
            assert!(!matches(&records(path, &bare), wanted, published));
            assert!(!matches(&records(path, &bare)[1..], wanted, ""));
        }
    }
}

#[test]
fn every_task_but_summaries_is_right_or_wrong() {
    for (schema, instruction, _) in WANTED {
        let rouge = instruction == SUMMARY;
        assert_eq!(schema.metric(), if rouge { Metric::Rouge1 } else { Metric::ExactMatch });
    }
}

#[test]
fn a_format_that_does_not_fit_names_both_sides() {
    for (schema, _, _) in WANTED {
        for (other, _, _) in WANTED {
            let path = fixture(&format!("tasks/{}.parquet", schema.name()));
            let row = read_rows(&path).unwrap().remove(0);
            let reading = Reading { format: Format(Some(other)), ..Reading::default() };
            match reading.record(row) {
                // A summary with a topic is a summary; one data set's columns hold another's.
                Ok(_) => assert!(
                    other == schema || (schema, other) == (Schema::Dialogsum, Schema::Samsum),
                    "{} read as {}",
                    schema.name(),
                    other.name()
                ),
                Err(error) => {
                    let message = error.to_string();
                    for part in ["row 1: ", "columns [", "the format", other.name()] {
                        assert!(message.contains(part), "{message}");
                    }
                }
            }
        }
    }
}
