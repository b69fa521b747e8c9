//! The walk against the standard's words, and attributes that no tree can be.

#![allow(clippy::cast_possible_wrap, clippy::cast_sign_loss)]

use super::forest::Forest;
use super::pack::{Attributes, MODE_LEAF, MODE_LEQ};

/// Random numbers that are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }

    #[allow(clippy::cast_precision_loss)]
    fn number(&mut self) -> f32 {
        self.below(64) as f32 / 8.0 - 4.0
    }
}

/// Trees with these features, each node an inner one or a leaf by chance.
fn random(dice: &mut Dice, trees: usize, features: usize, targets: usize) -> Attributes {
    let mut a = Attributes {
        targets,
        ..Attributes::default()
    };
    for tree in 0..trees as i64 {
        let mut open = vec![0];
        let mut next = 1;
        while let Some(id) = open.pop() {
            let leaf = next > 200 || (id > 0 && dice.below(3) == 0);
            a.tree_ids.push(tree);
            a.node_ids.push(id);
            a.feature_ids.push(dice.below(features) as i64);
            a.values.push(dice.number());
            a.missing_tracks_true.push(dice.below(2) as i64);
            a.modes.push(if leaf { MODE_LEAF } else { MODE_LEQ });
            a.true_node_ids.push(next);
            a.false_node_ids.push(next + 1);
            if leaf {
                a.target_tree_ids.push(tree);
                a.target_node_ids.push(id);
                a.target_ids.push(dice.below(targets) as i64);
                a.target_weights.push(dice.number());
            } else {
                open.extend([next, next + 1]);
                next += 2;
            }
        }
    }
    a
}

/// As ONNX says it, a node at a time.
fn plainly(a: &Attributes, x: &[f32]) -> Vec<f32> {
    let find = |tree: i64, node: i64| {
        (0..a.tree_ids.len()).find(|&i| a.tree_ids[i] == tree && a.node_ids[i] == node)
    };
    let mut out = vec![0.0; a.targets];
    let last = *a.tree_ids.last().unwrap();
    for tree in 0..=last {
        let mut at = find(tree, 0).unwrap();
        while a.modes[at] != MODE_LEAF {
            let value = x[a.feature_ids[at] as usize];
            let passes =
                value <= a.values[at] || (value.is_nan() && a.missing_tracks_true[at] == 1);
            let to = if passes {
                &a.true_node_ids
            } else {
                &a.false_node_ids
            };
            at = find(tree, to[at]).unwrap();
        }
        for i in 0..a.target_ids.len() {
            if a.target_tree_ids[i] == tree && a.target_node_ids[i] == a.node_ids[at] {
                out[a.target_ids[i] as usize] += a.target_weights[i];
            }
        }
    }
    out
}

#[test]
fn walks_as_the_standard_says() {
    let mut dice = Dice(7);
    for (trees, targets, rows, features) in [
        (1, 1, 1, 4),
        (5, 1, 40, 4),
        (40, 3, 17, 4),
        (33, 2, 150, 4),
        (70, 1, 7, 4),
        (70, 2, 23, 12),
    ] {
        let a = random(&mut dice, trees, features, targets);
        let forest = Forest::new(&a).unwrap();
        let columns = features + 1;
        let mut x: Vec<f32> = (0..rows * columns).map(|_| dice.number()).collect();
        x.iter_mut().step_by(7).for_each(|v| *v = f32::NAN);
        let mut out = vec![0.0; rows * targets];
        forest.sum(&x, columns, &mut out, &mut []);
        for (row, own) in x.chunks(columns).zip(out.chunks(targets)) {
            assert_eq!(plainly(&a, row), own);
            // Also where the processor has no wide registers.
            let mut again = vec![0.0; targets];
            forest.sum_row_plainly::<true>(0, row, &mut again, &mut []);
            assert_eq!(again, own);
        }
    }
}

#[test]
fn what_no_tree_can_be_is_an_error_or_harmless() {
    let mut dice = Dice(3);
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..3000 {
        let mut a = random(&mut dice, 2, 3, 2);
        let i = dice.below(a.tree_ids.len());
        let odd = [-1, 0, 1, 2, 7, 70_000, i64::MAX][dice.below(7)];
        let w = dice.below(a.target_ids.len());
        match dice.below(9) {
            0 => a.true_node_ids[i] = odd,
            1 => a.false_node_ids[i] = odd,
            2 => a.tree_ids[i] = odd,
            3 => a.node_ids[i] = odd,
            4 => a.feature_ids[i] = odd,
            5 => a.modes[i] = odd,
            6 => a.target_ids[w] = odd,
            7 => a.values[i] = f32::NAN,
            _ => drop(a.modes.pop()),
        }
        let Ok(forest) = Forest::new(&a) else {
            refused += 1;
            continue;
        };
        taken += 1;
        let columns = forest.features().max(1);
        let x: Vec<f32> = (0..20 * columns).map(|_| dice.number()).collect();
        let mut out = vec![0.0; 20 * forest.targets()];
        forest.sum(&x, columns, &mut out, &mut []);
    }
    assert!(
        refused > 500 && taken > 500,
        "{refused} refused, {taken} taken"
    );
}

#[test]
fn weights_of_what_is_not_there_are_an_error() {
    for (tree, node) in [(7, 0), (0, 7_000)] {
        let mut a = random(&mut Dice(5), 2, 3, 1);
        a.target_tree_ids[0] = tree;
        a.target_node_ids[0] = node;
        assert!(Forest::new(&a).is_err());
    }
}

#[test]
fn a_loop_is_an_error() {
    let mut dice = Dice(5);
    let mut a = random(&mut dice, 1, 3, 1);
    let last = a.modes.iter().rposition(|&m| m != MODE_LEAF).unwrap();
    a.true_node_ids[last] = 0;
    assert!(Forest::new(&a).is_err());
}

#[test]
#[should_panic(expected = "rows are too short")]
fn short_rows_are_not_read_beyond() {
    let a = random(&mut Dice(9), 3, 4, 1);
    Forest::new(&a)
        .unwrap()
        .sum(&[0.0; 6], 3, &mut [0.0; 2], &mut []);
}
