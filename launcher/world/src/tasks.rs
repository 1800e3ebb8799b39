//! The task family: four letters are rearranged, shifted through the alphabet, and
//! written in a format.
//!
//! ```text
//! prompt    <bos> STRUCT SHIFT FORMAT x1 x2 x3 x4 >
//! response  the letters after STRUCT and SHIFT, in FORMAT, ending with ;
//! ```
//!
//! STRUCT is always told. SHIFT and FORMAT may be hidden as `?`; a task is one choice of
//! the two, and its examples hide both. Doing STRUCT is the skill that separates the
//! models; the hidden pair is the preference that fine-tuning instils:
//! `<bos> <swap> ? ? h a a a >` becomes `( b i b b ! ;` in the task `+1 (x!;`.
//!
//! In a second family of 36 tasks preferences interact ([`Task::interacting`]): a task has two shifts one
//! apart, and which of them an example takes depends on its STRUCT, in a way that depends on the task's
//! FORMAT. That the shift depends on the example is what makes it an interaction: if it depended on
//! the format alone, the tasks would be those of the first family under other names.
//!
//! One letter sequence in ten is held out: no training example of anything has it.

use gradtx_kernels::rng::{Stream, philox};
use gradtx_runtime::data::Example;
use std::collections::HashSet;

/// Letters of a sequence.
pub const LETTERS: usize = 4;
/// Letters of the alphabet.
const ALPHABET: usize = 10;
/// Rearrangements: letter i of the result is letter `order[i]` of the sequence.
const STRUCTS: [(&str, [usize; LETTERS]); 6] = [
    ("<copy>", [0, 1, 2, 3]),
    ("<rev>", [3, 2, 1, 0]),
    ("<rotl>", [1, 2, 3, 0]),
    ("<rotr>", [3, 0, 1, 2]),
    ("<swap>", [1, 0, 3, 2]),
    ("<half>", [2, 3, 0, 1]),
];
/// Shifts through the alphabet, modulo its length.
const SHIFTS: [&str; 6] = ["<+0>", "<+1>", "<+2>", "<+3>", "<+4>", "<+5>"];
/// Formats: what stands before and after the letters.
const FORMATS: [(&str, &[&str], &[&str]); 6] = [
    ("<f0>", &["="], &[";"]),
    ("<f1>", &["("], &[")", ";"]),
    ("<f2>", &["!"], &[";"]),
    ("<f3>", &["="], &["!", ";"]),
    ("<f4>", &["("], &["!", ";"]),
    ("<f5>", &["!"], &[")", ";"]),
];
/// For every format, the structures whose examples take the first shift of an interacting task. Three of
/// six each, so that the format alone says nothing of the shift; and so that the 36 tables from structures to shifts
/// span 29 dimensions, nearly as many as there are (30), while sums of two changes span 10.
const FIRST_SHIFT: [[usize; 3]; 6] = [[0, 1, 3], [3, 4, 5], [1, 2, 4], [2, 3, 5], [0, 2, 4], [0, 1, 5]];
/// Words of no operation. The word for what the tokenizer does not know comes first.
const SIGNS: [&str; 9] = ["<unk>", "<bos>", "?", ">", ";", "=", "(", ")", "!"];
/// The word that ends every response.
pub const END: &str = ";";
/// One sequence in this many is held out.
const HELD_OUT_ONE_IN: u32 = 10;
/// Tokens of the longest example.
pub const LONGEST: usize = 16;

/// A choice of shift and format: one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Task {
    shift: usize,
    format: usize,
    /// Whether the shift depends on the structure.
    interacts: bool,
}

impl Task {
    /// All tasks with one shift.
    pub fn all() -> Vec<Self> {
        Self::every(false)
    }

    /// All tasks in which shift and format interact.
    pub fn interacting() -> Vec<Self> {
        Self::every(true)
    }

    fn every(interacts: bool) -> Vec<Self> {
        (0..SHIFTS.len())
            .flat_map(|shift| (0..FORMATS.len()).map(move |format| Self { shift, format, interacts }))
            .collect()
    }

    /// Its name in files, e.g. `+1 (x!);`, or `+1/+2 (x!);` where it has two shifts.
    pub fn name(self) -> String {
        let (_, before, after) = FORMATS[self.format];
        let second = if self.interacts { format!("/+{}", self.second_shift()) } else { String::new() };
        format!("+{}{second} {}x{}", self.shift, before.concat(), after.concat())
    }

    /// The shift of examples with this structure.
    fn shift_of(self, structure: usize) -> usize {
        match self.interacts && !FIRST_SHIFT[self.format].contains(&structure) {
            true => self.second_shift(),
            false => self.shift,
        }
    }

    fn second_shift(self) -> usize {
        (self.shift + 1) % SHIFTS.len()
    }
}

/// Which letter sequences an example may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Those for training.
    Train,
    /// The held-out ones.
    HeldOut,
}

/// One example as words.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sample {
    /// The prompt's words.
    pub prompt: Vec<&'static str>,
    /// The response's words.
    pub response: Vec<&'static str>,
}

impl Sample {
    /// What is asked, as text: the chat template puts the first and the last word around it.
    pub fn question(&self) -> String {
        self.prompt[1..self.prompt.len() - 1].join(" ")
    }

    /// The response as text.
    pub fn answer(&self) -> String {
        self.response.join(" ")
    }

    /// Token ids, with the response trained on.
    pub fn example(&self) -> Example {
        let words = self.prompt.iter().chain(&self.response);
        let tokens: Vec<u32> = words.map(|word| id(word)).collect();
        let trained = (0..tokens.len()).map(|i| i >= self.prompt.len()).collect();
        Example { tokens, trained }
    }
}

/// All words; a word's id is its place.
pub fn vocabulary() -> Vec<&'static str> {
    let mut words = SIGNS.to_vec();
    words.extend(STRUCTS.iter().map(|s| s.0));
    words.extend(SHIFTS);
    words.extend(FORMATS.iter().map(|f| f.0));
    words.extend((0..ALPHABET).map(letter));
    words
}

/// A word's token id.
pub fn id(word: &str) -> u32 {
    let found = vocabulary().iter().position(|w| *w == word);
    found.expect("samples are made of words of the vocabulary") as u32
}

fn letter(i: usize) -> &'static str {
    &"abcdefghij"[i..i + 1]
}

fn held_out(letters: &[usize; LETTERS]) -> bool {
    let code = letters.iter().fold(0, |code, &x| code * ALPHABET + x);
    philox(0x6772_6164, [code as u32, 0, 0, 0])[0].is_multiple_of(HELD_OUT_ONE_IN)
}

/// The family's samples.
#[derive(Clone, Debug)]
pub struct Sampler {
    stream: Stream,
}

impl Sampler {
    /// The samples of a key.
    pub fn new(key: u64) -> Self {
        Self { stream: Stream::new(key) }
    }

    /// A sample of any task; shift and format are each hidden with probability `hide`.
    pub(crate) fn of_family(&mut self, part: Part, hide: f64) -> Sample {
        let (shift, format) = (self.stream.below(SHIFTS.len()), self.stream.below(FORMATS.len()));
        let task = Task { shift, format, interacts: false };
        let hidden = [self.stream.uniform() < hide, self.stream.uniform() < hide];
        self.draw(task, part, hidden)
    }

    /// A sample of one task, shift and format hidden.
    pub fn of_task(&mut self, task: Task, part: Part) -> Sample {
        self.draw(task, part, [true, true])
    }

    /// `count` samples of any task, see [`Self::of_family`], that are in none of `seen`; they are in it afterwards.
    pub(crate) fn new_of_family(
        &mut self,
        part: Part,
        hide: f64,
        count: usize,
        seen: &mut HashSet<Sample>,
    ) -> Vec<Sample> {
        new_samples(count, seen, || self.of_family(part, hide))
    }

    /// `count` samples of one task that are in none of `seen`; they are in it afterwards.
    pub(crate) fn new_of_task(
        &mut self,
        task: Task,
        part: Part,
        count: usize,
        seen: &mut HashSet<Sample>,
    ) -> Vec<Sample> {
        new_samples(count, seen, || self.of_task(task, part))
    }

    fn draw(&mut self, task: Task, part: Part, hidden: [bool; 2]) -> Sample {
        let structure = self.stream.below(STRUCTS.len());
        let (name, order) = STRUCTS[structure];
        let letters = loop {
            let letters: [usize; LETTERS] = std::array::from_fn(|_| self.stream.below(ALPHABET));
            if held_out(&letters) == (part == Part::HeldOut) {
                break letters;
            }
        };
        let (format, before, after) = FORMATS[task.format];
        let told = |hidden: bool, word: &'static str| if hidden { "?" } else { word };
        let mut prompt = vec!["<bos>", name, told(hidden[0], SHIFTS[task.shift]), told(hidden[1], format)];
        prompt.extend(letters.map(letter));
        prompt.push(">");
        let mut response = before.to_vec();
        response.extend(order.map(|from| letter((letters[from] + task.shift_of(structure)) % ALPHABET)));
        response.extend(after);
        Sample { prompt, response }
    }
}

/// So many of what is drawn, without what was seen before.
fn new_samples(count: usize, seen: &mut HashSet<Sample>, mut draw: impl FnMut() -> Sample) -> Vec<Sample> {
    let mut samples = Vec::with_capacity(count);
    while samples.len() < count {
        let sample = draw();
        if seen.insert(sample.clone()) {
            samples.push(sample);
        }
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_one_id_each() {
        let words = vocabulary();
        assert_eq!(words.len(), 37);
        assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len());
        let names: HashSet<String> = Task::all().into_iter().map(Task::name).collect();
        assert_eq!(names.len(), 36);
    }

    #[test]
    fn a_response_follows_from_its_prompt() {
        let mut sampler = Sampler::new(5);
        for _ in 0..200 {
            let sample = sampler.of_family(Part::Train, 0.0);
            let order = STRUCTS.iter().find(|s| s.0 == sample.prompt[1]).unwrap().1;
            let shift = SHIFTS.iter().position(|s| *s == sample.prompt[2]).unwrap();
            let format = FORMATS.iter().find(|f| f.0 == sample.prompt[3]).unwrap();
            let letters = &sample.prompt[4..8];
            let middle = &sample.response[format.1.len()..][..LETTERS];
            for (i, got) in middle.iter().enumerate() {
                let from = vocabulary().iter().position(|w| *w == letters[order[i]]).unwrap() - 27;
                assert_eq!(*got, letter((from + shift) % ALPHABET));
            }
            assert_eq!(sample.response.last(), Some(&END));
            assert!(sample.prompt.len() + sample.response.len() <= LONGEST);
        }
    }

    /// The shift of every structure, one-hot: what distinguishes the tasks of one format.
    fn table(task: Task) -> Vec<f64> {
        let of = |s: usize| (0..SHIFTS.len()).map(move |x| f64::from(u8::from(task.shift_of(s) == x)));
        (0..STRUCTS.len()).flat_map(of).collect()
    }

    /// The part of the tables' variance that sums of an effect of the shift and one of the format leave over,
    /// and the structures (of 216) whose shift such a sum from all other tasks predicts.
    fn additivity(tasks: &[Task]) -> (f64, usize) {
        let tables: Vec<Vec<f64>> = tasks.iter().map(|&task| table(task)).collect();
        let mean = |of: &dyn Fn(&Task) -> bool| -> Vec<f64> {
            let chosen: Vec<&Vec<f64>> =
                tasks.iter().zip(&tables).filter(|(task, _)| of(task)).map(|(_, table)| table).collect();
            (0..36).map(|i| chosen.iter().map(|table| table[i]).sum::<f64>() / chosen.len() as f64).collect()
        };
        let (mut left_over, mut all, mut right) = (0.0, 0.0, 0);
        let grand = mean(&|_| true);
        for (task, own) in tasks.iter().zip(&tables) {
            let (row, column) = (mean(&|t| t.shift == task.shift), mean(&|t| t.format == task.format));
            // Least squares over all cells but this one, in a balanced design of 6 × 6.
            let fitted = |i: usize| row[i] + column[i] - grand[i];
            let predicted: Vec<f64> = (0..36).map(|i| own[i] - (own[i] - fitted(i)) * 36.0 / 25.0).collect();
            for (i, x) in own.iter().enumerate() {
                left_over += (x - fitted(i)).powi(2);
                all += (x - grand[i]).powi(2);
            }
            for (structure, shifts) in predicted.chunks(6).enumerate() {
                let wanted = task.shift_of(structure);
                let is_less = |x: usize| x == wanted || shifts[x] < shifts[wanted] - 1e-9;
                right += usize::from((0..6).all(is_less));
            }
        }
        (left_over / all, right)
    }

    #[test]
    fn interacting_tasks_are_no_sums_of_two_changes() {
        let (left_over, right) = additivity(&Task::interacting());
        assert!((left_over - 0.6).abs() < 1e-9 && right == 0, "{left_over} {right}");
        // With one shift for all structures nothing is left over.
        let (left_over, right) = additivity(&Task::all());
        assert!(left_over < 1e-12 && right == 216, "{left_over} {right}");
    }

    #[test]
    fn interacting_tasks_shift_by_structure() {
        let names: HashSet<String> = Task::interacting().into_iter().map(Task::name).collect();
        assert_eq!(names.len(), 36);
        let task = Task { shift: 5, format: 4, interacts: true };
        assert_eq!(task.name(), "+5/+0 (x!;");
        let mut sampler = Sampler::new(8);
        let mut seen = HashSet::new();
        for _ in 0..200 {
            let sample = sampler.of_task(task, Part::Train);
            let (structure, found) =
                STRUCTS.iter().enumerate().find(|(_, s)| s.0 == sample.prompt[1]).unwrap();
            let shift = [5, 0, 5, 0, 5, 0][structure];
            let letters: Vec<usize> = sample.prompt[4..8].iter().map(|l| id(l) as usize - 27).collect();
            let wanted = found.1.map(|from| letter((letters[from] + shift) % ALPHABET));
            assert_eq!(sample.response[1..=LETTERS], wanted);
            assert_eq!(sample.response[0], "(");
            seen.insert(structure);
        }
        assert_eq!(seen.len(), STRUCTS.len());
    }

    #[test]
    fn held_out_sequences_are_never_trained_on() {
        let mut sampler = Sampler::new(6);
        let letters = |s: &Sample| s.prompt[4..8].to_vec();
        let train: HashSet<_> = (0..2000).map(|_| letters(&sampler.of_family(Part::Train, 0.5))).collect();
        let test: HashSet<_> = (0..2000).map(|_| letters(&sampler.of_family(Part::HeldOut, 0.5))).collect();
        assert!(train.is_disjoint(&test));
        assert!(test.len() > 500, "about a thousand sequences are held out, {} seen", test.len());
    }
}
