//! A regressor's trees with what makes a value of their sums; and those that ONNX Runtime has made, for who
//! runs them without it.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Weak};

use parking_lot::Mutex;

use super::forest::Forest;
use super::scores::Regressor;

/// See the module.
pub struct Ensemble {
    forest: Forest,
    finish: Regressor,
}

/// By the number that a model gives its trees.
static MADE: LazyLock<Mutex<HashMap<i64, Weak<Ensemble>>>> = LazyLock::new(Mutex::default);

impl Ensemble {
    pub fn new(forest: Forest, finish: Regressor) -> Self {
        Self { forest, finish }
    }

    /// Columns that rows must have at least.
    pub fn features(&self) -> usize {
        self.forest.features()
    }

    pub fn targets(&self) -> usize {
        self.forest.targets()
    }

    /// Nodes that a row visits at most.
    pub fn visits(&self) -> usize {
        self.forest.visits()
    }

    /// The values of rows `x` [rows, columns], into `out` [rows, targets].
    ///
    /// # Panics
    /// Rows that are too short, or an `out` that does not fit them.
    pub fn run(&self, x: &[f32], columns: usize, out: &mut [f32]) {
        let targets = self.forest.targets();
        let mut has = vec![false; if self.finish.asks() { out.len() } else { 0 }];
        self.forest.sum(x, columns, out, &mut has);
        for (row, sums) in out.chunks_mut(targets).enumerate() {
            self.finish
                .finish(sums, has.chunks(targets).nth(row).unwrap_or(&[]));
        }
    }

    /// Lets others find it by a number, as long as it is there.
    pub fn publish(self: &Arc<Self>, number: i64) {
        let mut made = MADE.lock();
        made.retain(|_, known| known.strong_count() > 0);
        made.insert(number, Arc::downgrade(self));
    }

    /// The one that was published with this number.
    pub fn find(number: i64) -> Option<Arc<Self>> {
        MADE.lock().get(&number)?.upgrade()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::trees::pack::{Attributes, MODE_LEAF, MODE_LEQ};

    /// `x[0] <= 1 ? 10 : 20`.
    pub fn stump() -> Arc<Ensemble> {
        let forest = Forest::new(&Attributes {
            tree_ids: vec![0; 3],
            node_ids: vec![0, 1, 2],
            feature_ids: vec![0; 3],
            values: vec![1.0, 0.0, 0.0],
            modes: vec![MODE_LEQ, MODE_LEAF, MODE_LEAF],
            true_node_ids: vec![1, 0, 0],
            false_node_ids: vec![2, 0, 0],
            target_tree_ids: vec![0; 2],
            target_node_ids: vec![1, 2],
            target_ids: vec![0; 2],
            target_weights: vec![10.0, 20.0],
            targets: 1,
            ..Attributes::default()
        });
        let finish = Regressor {
            base: Vec::new(),
            average: None,
        };
        Arc::new(Ensemble::new(forest.unwrap(), finish))
    }

    #[test]
    fn it_is_found_as_long_as_somebody_has_it() {
        let made = stump();
        assert_eq!((made.features(), made.targets(), made.visits()), (1, 1, 1));
        let number = -7;
        made.publish(number);
        assert!(Arc::ptr_eq(&Ensemble::find(number).unwrap(), &made));
        drop(made);
        assert!(Ensemble::find(number).is_none());
    }
}
