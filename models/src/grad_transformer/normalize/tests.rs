use super::*;
use gradtx_kernels::rng::Stream;

const STUDENT: [usize; 2] = [2, 5];
const TEACHER: [usize; 2] = [3, 7];
const COUNT: usize = 41;

/// Tuples whose coordinates have means and deviations of their own.
fn tuples(shape: [usize; 2], key: u64) -> Vec<f32> {
    let mut stream = Stream::new(key);
    let values = (0..COUNT).flat_map(|_| 0..shape[0] * shape[1]);
    values.map(|i| (3.0 + i as f64 + stream.normal() * (0.1 + i as f64)) as f32 * 1e-3).collect()
}

fn fit(mode: NormalizationMode) -> (Normalization, Vec<f32>, Vec<f32>) {
    let (student, teacher) = (tuples(STUDENT, 1), tuples(TEACHER, 2));
    let mut fit = NormalizationFit::new(mode, STUDENT, TEACHER);
    for (s, t) in student.chunks(10).zip(teacher.chunks(21)) {
        fit.add(s, t).unwrap();
    }
    (fit.finish().unwrap(), student, teacher)
}

#[test]
fn a_fit_in_parts_is_the_same_to_the_bit() {
    for (mode, _) in NormalizationMode::ALL {
        let (whole, student, teacher) = fit(mode);
        for len in [1, 4, 100] {
            let mut fit = NormalizationFit::new(mode, STUDENT, TEACHER);
            for tuples in [0..17, 17..COUNT] {
                for mut part in fit.add_in_parts(tuples.len(), len) {
                    let (all, each) = match part.role() {
                        Role::Student => (&student, 10),
                        Role::Teacher => (&teacher, 21),
                    };
                    for tuple in tuples.clone() {
                        let from = tuple * each + part.from();
                        part.add(&all[from..from + part.len()]);
                    }
                }
            }
            assert_eq!(fit.finish().unwrap(), whole, "{mode:?} in parts of {len}");
        }
    }
}

fn mean(x: impl Iterator<Item = f64>) -> f64 {
    let values: Vec<f64> = x.collect();
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn every_mode_can_be_undone_and_survives_files() {
    let dir = tempfile::tempdir().unwrap();
    for (mode, name) in NormalizationMode::ALL {
        assert_eq!(NormalizationMode::parse(name), Some(mode));
        let (normalization, _, teacher) = fit(mode);
        let mut there = teacher.clone();
        normalization.apply_teacher(&mut there).unwrap();
        assert_eq!(there == teacher, mode == NormalizationMode::None);
        normalization.undo_teacher(&mut there).unwrap();
        let worst = there.iter().zip(&teacher).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-8, "{name}: {worst}");
        normalization.save(dir.path()).unwrap();
        let loaded = Normalization::load(dir.path(), mode, STUDENT, TEACHER).unwrap();
        assert_eq!(loaded, normalization);
        let mut values = normalization.values();
        assert_eq!(Normalization::from_values(mode, STUDENT, TEACHER, &values).unwrap(), normalization);
        values.push(1.0);
        assert!(Normalization::from_values(mode, STUDENT, TEACHER, &values).is_err());
    }
    let wrong = Normalization::load(dir.path(), NormalizationMode::Block, STUDENT, TEACHER);
    assert!(wrong.unwrap_err().to_string().contains("coordinate"));
}

/// As the formula has it, value by value; parts of any length from anywhere are those of the whole.
#[test]
fn every_mode_computes_its_formula_to_the_bit() {
    for (mode, name) in NormalizationMode::ALL {
        let (normalization, students, teachers) = fit(mode);
        for (role, side, all) in [
            (Role::Student, &normalization.student, &students),
            (Role::Teacher, &normalization.teacher, &teachers),
        ] {
            let len = side.shape[0] * side.shape[1];
            let at = |i: usize| {
                let mean = side.mean.get(i % len).map_or(0.0, |&m| m as f64);
                (mean, side.scale[i % len / (len / side.scale.len())] as f64)
            };
            let wanted: Vec<f32> =
                (0..all.len()).map(|i| ((all[i] as f64 - at(i).0) / at(i).1) as f32).collect();
            let mut found = all.clone();
            side.convert(&mut found, Way::IntoUnits).unwrap();
            assert!(found.iter().map(|x| x.to_bits()).eq(wanted.iter().map(|x| x.to_bits())), "{name}");
            for (from, to) in [(0, len), (0, 1), (3, 9), (len - 1, len), (4, 4), (1, len)] {
                let mut part = all[from..to].to_vec();
                normalization.apply_part(role, &mut part, from);
                assert_eq!(part, wanted[from..to], "{name}: {from}..{to}");
            }
            side.convert(&mut found, Way::Back).unwrap();
            let back = (0..all.len()).map(|i| (wanted[i] as f64 * at(i).1 + at(i).0) as f32);
            assert!(back.map(f32::to_bits).eq(found.iter().map(|x| x.to_bits())), "{name}");
            assert!(side.convert(&mut [0.0; 4], Way::Back).is_err());
        }
    }
}

#[test]
fn what_each_mode_normalises_has_mean_0_and_square_1() {
    let square = |x: &[f32]| mean(x.iter().map(|&v| (v as f64).powi(2)));
    for mode in [NormalizationMode::Scalar, NormalizationMode::ScalarCentred, NormalizationMode::Block] {
        let (normalization, mut student, _) = fit(mode);
        normalization.apply_student(&mut student).unwrap();
        assert!((square(&student) - 1.0).abs() <= 1e-4, "{mode:?}");
        let first: f64 = mean(student.iter().step_by(10).map(|&x| x as f64));
        assert_eq!(first.abs() <= 1e-5, mode != NormalizationMode::Scalar, "{mode:?}: mean {first}");
        let block: Vec<f32> = student.chunks(10).flat_map(|u| u[..5].to_vec()).collect();
        let alike = (square(&block) - 1.0).abs() <= 1e-4;
        assert_eq!(alike, mode == NormalizationMode::Block, "{mode:?}");
    }
    let (normalization, mut student, _) = fit(NormalizationMode::Coordinate);
    normalization.apply_student(&mut student).unwrap();
    let last: Vec<f32> = student.iter().skip(9).step_by(10).copied().collect();
    assert!((0.8..1.0).contains(&square(&last)), "{}", square(&last));
}

#[test]
fn statistics_that_are_no_units_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mode = NormalizationMode::Block;
    let (good, ..) = fit(mode);
    let refused = |say: &str, change: &dyn Fn(&mut Normalization)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad.save(dir.path()).unwrap();
        let message = Normalization::load(dir.path(), mode, STUDENT, TEACHER).unwrap_err().to_string();
        assert!(message.contains(say) && message.contains(FILE), "{message}");
    };
    refused("teacher.scale", &|n| n.teacher.scale[2] = 0.0);
    refused("student.scale", &|n| n.student.scale[0] = -1.0);
    refused("element 1", &|n| n.teacher.scale[1] = 1e-42);
    refused("not a finite number", &|n| n.student.scale[1] = f32::NAN);
    refused("not a finite number", &|n| n.student.scale[1] = f32::INFINITY);
    refused("student.mean", &|n| n.student.mean[7] = f32::NEG_INFINITY);
    refused("expected shape", &|n| _ = n.teacher.scale.pop());
    good.save(dir.path()).unwrap();
    assert_eq!(Normalization::load(dir.path(), mode, STUDENT, TEACHER).unwrap(), good);
    // Updates so small that no number of 32 bits divides them.
    let mut tiny = NormalizationFit::new(mode, STUDENT, TEACHER);
    for sign in [1.0, -1.0] {
        tiny.add(&[sign * 1e-41; 10], &[sign; 21]).unwrap();
    }
    assert!(tiny.finish().unwrap_err().to_string().contains("student"));
}

#[test]
fn what_cannot_be_fitted_is_refused() {
    let mut fit = NormalizationFit::new(NormalizationMode::ScalarCentred, STUDENT, TEACHER);
    assert!(fit.add(&[1.0; 9], &[1.0; 21]).is_err());
    let mut fit = NormalizationFit::new(NormalizationMode::ScalarCentred, STUDENT, TEACHER);
    for _ in 0..3 {
        fit.add(&[1.0; 10], &[2.0; 21]).unwrap();
    }
    assert!(fit.finish().unwrap_err().to_string().contains("student"));
    assert!(NormalizationFit::new(NormalizationMode::Scalar, STUDENT, TEACHER).finish().is_err());
    let mut fit = NormalizationFit::new(NormalizationMode::Scalar, STUDENT, TEACHER);
    fit.add(&[f32::NAN; 10], &[2.0; 21]).unwrap();
    assert!(fit.finish().is_err());
}
