//! Word stems, for ROUGE: the Porter stemmer with the changes that NLTK makes to it by
//! default (`PorterStemmer.NLTK_EXTENSIONS`), which is what published ROUGE scores use.
//!
//! In: a word of the letters a to z and digits. Out: its stem.
//!
//! A suffix is taken off or replaced in steps 1a to 5b. What may happen to a word depends
//! on the *measure* of what is left without the suffix: written as runs of vowels V and
//! consonants C it is `[C](VC)…(VC)[V]`, and the measure counts the VC. In each table of
//! rules the first suffix that the word ends in is the only one that is tried.
//!
//! NLTK's changes are marked with "NLTK:". They are a table of irregular words and small
//! changes to steps 1a, 1b, 1c and 2 and to the shape that brings back a final e.

/// NLTK: words with stems of their own.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// The stem of a word of `[a-z0-9]`.
pub fn stem(word: &str) -> String {
    if let Some((_, stem)) = IRREGULAR.iter().find(|(irregular, _)| *irregular == word) {
        return (*stem).to_string();
    }
    if word.len() <= 2 {
        return word.to_string();
    }
    let mut word = word.to_string();
    plurals(&mut word);
    past_and_participle(&mut word);
    final_y(&mut word);
    double_suffixes(&mut word);
    replace_first(&mut word, &STEP_3, 0);
    single_suffixes(&mut word);
    final_e(&mut word);
    final_double_l(&mut word);
    word
}

/// One letter per letter of the word: is it a consonant? A y is one unless it follows one.
fn consonants(word: &str) -> Vec<bool> {
    let mut flags: Vec<bool> = Vec::with_capacity(word.len());
    for letter in word.bytes() {
        flags.push(match letter {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => !flags.last().copied().unwrap_or(false),
            _ => true,
        });
    }
    flags
}

/// How often a consonant follows a vowel.
fn measure(word: &str) -> usize {
    consonants(word).windows(2).filter(|pair| !pair[0] && pair[1]).count()
}

fn has_vowel(word: &str) -> bool {
    consonants(word).contains(&false)
}

/// Ends in the same consonant twice.
fn ends_in_double(word: &str) -> bool {
    let letters = word.as_bytes();
    let n = letters.len();
    n >= 2 && letters[n - 1] == letters[n - 2] && consonants(word)[n - 1]
}

/// Ends in consonant, vowel, consonant, the last of them not w, x or y: a short syllable
/// such as `hop`, which is written with an e when it is long. NLTK: or is vowel, consonant.
fn ends_short(word: &str) -> bool {
    match consonants(word).as_slice() {
        [false, true] => true,
        [.., true, false, true] => !word.ends_with(['w', 'x', 'y']),
        _ => false,
    }
}

/// Puts `with` in the place of the last `len` letters.
fn replace(word: &mut String, len: usize, with: &str) {
    word.truncate(word.len() - len);
    word.push_str(with);
}

/// Finds the first suffix of a table that the word ends in, and replaces it if what is
/// left measures more than `above`.
fn replace_first(word: &mut String, rules: &[(&str, &str)], above: usize) {
    let Some((suffix, with)) = rules.iter().find(|(suffix, _)| word.ends_with(suffix)) else { return };
    if measure(&word[..word.len() - suffix.len()]) > above {
        replace(word, suffix.len(), with);
    }
}

/// Step 1a: plurals.
fn plurals(word: &mut String) {
    if word.ends_with("sses") {
        replace(word, 2, "");
    } else if word.ends_with("ies") {
        // NLTK: `dies` becomes `die`, but `flies` becomes `fli`.
        let keep_e = word.len() == 4;
        replace(word, if keep_e { 1 } else { 2 }, "");
    } else if word.ends_with('s') && !word.ends_with("ss") {
        replace(word, 1, "");
    }
}

/// Step 1b: -eed, -ed and -ing.
fn past_and_participle(word: &mut String) {
    if word.ends_with("ied") {
        // NLTK: `died` becomes `die`, but `spied` becomes `spi`.
        let keep_e = word.len() == 4;
        return replace(word, if keep_e { 1 } else { 2 }, "");
    }
    if word.ends_with("eed") {
        if measure(&word[..word.len() - 3]) > 0 {
            replace(word, 1, "");
        }
        return;
    }
    let Some(suffix) = ["ed", "ing"].into_iter().find(|suffix| word.ends_with(suffix)) else { return };
    if !has_vowel(&word[..word.len() - suffix.len()]) {
        return;
    }
    replace(word, suffix.len(), "");
    // What the suffix did to the word before it is undone.
    if ["at", "bl", "iz"].iter().any(|end| word.ends_with(end)) {
        word.push('e');
    } else if ends_in_double(word) {
        if !word.ends_with(['l', 's', 'z']) {
            word.pop();
        }
    } else if measure(word) == 1 && ends_short(word) {
        word.push('e');
    }
}

/// Step 1c. NLTK: a final y becomes i after a consonant that is not the first letter.
fn final_y(word: &mut String) {
    if let Some(rest) = word.strip_suffix('y')
        && rest.len() > 1
        && consonants(rest).last() == Some(&true)
    {
        replace(word, 1, "i");
    }
}

const STEP_2: [(&str, &str); 21] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    // NLTK
    ("fulli", "ful"),
];

/// Step 2: suffixes that were put on other suffixes.
fn double_suffixes(word: &mut String) {
    // NLTK: -alli first, and then what has become of it once more.
    if let Some(rest) = word.strip_suffix("alli")
        && measure(rest) > 0
    {
        replace(word, 2, "");
    }
    // NLTK: in -logi the l counts with what stands before it, as in `theology`.
    if word.ends_with("logi") {
        if measure(&word[..word.len() - 3]) > 0 {
            replace(word, 1, "");
        }
        return;
    }
    replace_first(word, &STEP_2, 0);
}

const STEP_3: [(&str, &str); 7] = [
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
];

const STEP_4: [(&str, &str); 18] = [
    ("al", ""),
    ("ance", ""),
    ("ence", ""),
    ("er", ""),
    ("ic", ""),
    ("able", ""),
    ("ible", ""),
    ("ant", ""),
    ("ement", ""),
    ("ment", ""),
    ("ent", ""),
    ("ou", ""),
    ("ism", ""),
    ("ate", ""),
    ("iti", ""),
    ("ous", ""),
    ("ive", ""),
    ("ize", ""),
];

/// Step 4: suffixes of longer words; -ion only after s or t.
fn single_suffixes(word: &mut String) {
    match word.strip_suffix("ion") {
        Some(rest) if measure(rest) > 1 && rest.ends_with(['s', 't']) => replace(word, 3, ""),
        Some(_) => {}
        None => replace_first(word, &STEP_4, 1),
    }
}

/// Step 5a: a final e, unless the word is short without it.
fn final_e(word: &mut String) {
    if let Some(rest) = word.strip_suffix('e')
        && (measure(rest) > 1 || (measure(rest) == 1 && !ends_short(rest)))
    {
        word.pop();
    }
}

/// Step 5b: a final double l.
fn final_double_l(word: &mut String) {
    if word.ends_with("ll") && measure(&word[..word.len() - 1]) > 1 {
        word.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures() {
        for (words, want) in [
            (&["tr", "ee", "tree", "y", "by", ""][..], 0),
            (&["trouble", "oats", "trees", "ivy"], 1),
            (&["troubles", "private", "oaten"], 2),
        ] {
            words.iter().for_each(|word| assert_eq!(measure(word), want, "{word}"));
        }
        assert_eq!(consonants("syzygy"), [true, false, true, false, true, false]);
    }

    /// A word for every rule, and for every change of NLTK's; thousands more are compared
    /// with the reference in the tests crate.
    #[test]
    fn rules() {
        for (word, want) in [
            ("caresses", "caress"),
            ("flies", "fli"),
            ("dies", "die"),
            ("died", "die"),
            ("dying", "die"),
            ("agreed", "agre"),
            ("feed", "feed"),
            ("plastered", "plaster"),
            ("bled", "bled"),
            ("sized", "size"),
            ("hopping", "hop"),
            ("falling", "fall"),
            ("filing", "file"),
            ("happy", "happi"),
            ("enjoy", "enjoy"),
            ("relational", "relat"),
            ("rationally", "ration"),
            ("geology", "geolog"),
            ("hopefully", "hope"),
            ("electrical", "electr"),
            ("adoption", "adopt"),
            ("onion", "onion"),
            ("controller", "control"),
            ("x86", "x86"),
        ] {
            assert_eq!(stem(word), want, "{word}");
        }
    }
}
