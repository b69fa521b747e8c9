//! Trees packed for the cache, and walked several at a time.
//!
//! What a walk waits for is memory: a node's address is known only when its parent was compared. So a
//! node is 8 bytes with its children side by side, a tree lies level by level, and `LANES` rows (or for a
//! single row, trees) go down together: while one waits for its node, the others' are under way.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::wide;

/// Rows, or trees, that go down together.
const LANES: usize = 16;
/// Where fewer rows are left.
const FEW: usize = 8;
/// Rows that go through one tree before the next: they stay in the cache meanwhile.
const TILE: usize = 128;

/// A node, packed. Trees of more nodes, and more features, are not for this.
#[derive(Clone, Copy, Default)]
#[repr(C, align(8))]
pub(super) struct Node {
    /// Of an inner node: values up to it pass. Of a leaf: its value, or in forests with several targets the
    /// bits of the place of its weights in `starts`.
    threshold: f32,
    /// From the least bit: the child for values that pass, counted from the root (the other lies behind it;
    /// a leaf's is itself), the feature, `INNER`, `MISSING_PASSES`.
    word: u32,
}

pub(super) const MAX_NODES: usize = 1 << 20;
pub(super) const MAX_FEATURES: usize = 1 << 10;
pub(super) const FEATURE_AT: u32 = 20;
pub(super) const INNER: u32 = 1 << 30;
const MISSING_PASSES: u32 = 1 << 31;

impl Node {
    pub(super) fn inner(threshold: f32, next: usize, feature: usize, missing_passes: bool) -> Self {
        let missing = if missing_passes { MISSING_PASSES } else { 0 };
        Self {
            threshold,
            word: next as u32 | (feature as u32) << FEATURE_AT | INNER | missing,
        }
    }

    pub(super) fn leaf(value: f32, place: usize) -> Self {
        Self {
            threshold: value,
            word: place as u32,
        }
    }
}

#[derive(Default)]
pub(super) struct Tree {
    /// Its nodes are these of the forest's.
    pub(super) nodes: Range<usize>,
    pub(super) depth: u32,
}

#[derive(Default)]
pub struct Forest {
    pub(super) nodes: Vec<Node>,
    pub(super) trees: Vec<Tree>,
    /// In forests with several targets: where the leaves' weights begin, and where the last end.
    pub(super) starts: Vec<u32>,
    pub(super) weights: Vec<(u32, f32)>,
    pub(super) targets: usize,
    pub(super) features: usize,
    pub(super) missing: bool,
}

impl Forest {
    pub fn trees(&self) -> usize {
        self.trees.len()
    }

    pub fn targets(&self) -> usize {
        self.targets
    }

    /// Nodes that a row visits at most.
    pub fn visits(&self) -> usize {
        self.trees.iter().map(|t| t.depth as usize).sum()
    }

    /// Columns that rows must have at least.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Add the leaves' weights up, tree by tree, into `out` [rows, targets]; `has`, of the same size where
    /// it is not empty, becomes true where there was one. `x` [rows, columns].
    ///
    /// # Panics
    /// Rows that are too short, or an `out` that does not fit them.
    pub fn sum(&self, x: &[f32], columns: usize, out: &mut [f32], has: &mut [bool]) {
        assert!(
            columns >= self.features && columns > 0,
            "rows are too short"
        );
        let rows = x.len() / columns;
        assert!(x.len() == rows * columns && out.len() == rows * self.targets);
        assert!(has.is_empty() || has.len() == out.len());
        out.fill(0.0);
        has.fill(false);
        if self.missing {
            self.sum_tiles::<true>(x, columns, out, has);
        } else {
            self.sum_tiles::<false>(x, columns, out, has);
        }
    }

    fn sum_tiles<const MISSING: bool>(
        &self,
        x: &[f32],
        columns: usize,
        out: &mut [f32],
        has: &mut [bool],
    ) {
        let rows = x.len() / columns;
        let mut first = 0;
        while rows - first >= LANES {
            let len = (rows - first).min(TILE) / LANES * LANES;
            self.sum_rows::<MISSING, LANES>(first..first + len, x, columns, out, has);
            first += len;
        }
        if rows - first >= FEW {
            self.sum_rows::<MISSING, FEW>(first..first + FEW, x, columns, out, has);
            first += FEW;
        }
        for row in first..rows {
            let own = &x[row * columns..(row + 1) * columns];
            self.sum_row::<MISSING>(row, own, out, has);
        }
    }

    /// A row, several trees together.
    fn sum_row<const MISSING: bool>(
        &self,
        row: usize,
        own: &[f32],
        out: &mut [f32],
        has: &mut [bool],
    ) {
        #[cfg(target_arch = "x86_64")]
        if wide::can() && self.nodes.len() < i32::MAX as usize {
            for trees in self.trees.chunks(wide::LANES) {
                let (roots, depth) = together(trees);
                // SAFETY: see `wide::descend`; no feature is beyond `own`.
                let ends = unsafe { wide::descend::<MISSING>(&self.nodes, &roots, depth, own) };
                self.add_leaves(&ends[..trees.len()], row, out, has);
            }
            return;
        }
        self.sum_row_plainly::<MISSING>(row, own, out, has);
    }

    pub(super) fn sum_row_plainly<const MISSING: bool>(
        &self,
        row: usize,
        own: &[f32],
        out: &mut [f32],
        has: &mut [bool],
    ) {
        for trees in self.trees.chunks(LANES) {
            let (roots, depth) = together::<LANES>(trees);
            // SAFETY: see `descend`; no feature is beyond `own`.
            let mut ends = descend::<MISSING, LANES>(
                depth,
                |j, at| unsafe { *self.nodes.get_unchecked((roots[j] + at) as usize) },
                |_, feature| unsafe { *own.get_unchecked(feature) },
            );
            for (end, root) in ends.iter_mut().zip(roots) {
                *end += root;
            }
            self.add_leaves(&ends[..trees.len()], row, out, has);
        }
    }

    fn add_leaves(&self, nodes: &[u32], row: usize, out: &mut [f32], has: &mut [bool]) {
        for &node in nodes {
            self.add_leaf(self.nodes[node as usize].threshold, row, out, has);
        }
    }

    /// So many rows that they come out even.
    fn sum_rows<const MISSING: bool, const N: usize>(
        &self,
        rows: Range<usize>,
        x: &[f32],
        columns: usize,
        out: &mut [f32],
        has: &mut [bool],
    ) {
        for tree in &self.trees {
            let nodes = &self.nodes[tree.nodes.clone()];
            for row in rows.clone().step_by(N) {
                let own = &x[row * columns..(row + N) * columns];
                // SAFETY: see `descend`; `own` has `N` rows of `columns`, and no feature is beyond.
                let ends = descend::<MISSING, N>(
                    tree.depth,
                    |_, at| unsafe { *nodes.get_unchecked(at as usize) },
                    |j, feature| unsafe { *own.get_unchecked(j * columns + feature) },
                );
                for (j, end) in ends.into_iter().enumerate() {
                    self.add_leaf(nodes[end as usize].threshold, row + j, out, has);
                }
            }
        }
    }

    #[inline]
    fn add_leaf(&self, value: f32, row: usize, out: &mut [f32], has: &mut [bool]) {
        if self.targets == 1 {
            out[row] += value;
            if let Some(has) = has.get_mut(row) {
                *has = true;
            }
            return;
        }
        let leaf = value.to_bits() as usize;
        let own = self.starts[leaf] as usize..self.starts[leaf + 1] as usize;
        let out = &mut out[row * self.targets..(row + 1) * self.targets];
        let has = has.get_mut(row * self.targets..(row + 1) * self.targets);
        for &(target, weight) in &self.weights[own.clone()] {
            out[target as usize] += weight;
        }
        if let Some(has) = has {
            for &(target, _) in &self.weights[own] {
                has[target as usize] = true;
            }
        }
    }
}

/// The roots of up to `N` trees, the last one again for those that are missing; and the deepest's depth.
fn together<const N: usize>(trees: &[Tree]) -> ([u32; N], u32) {
    let last = trees.len() - 1;
    let roots = std::array::from_fn(|j| trees[j.min(last)].nodes.start as u32);
    (roots, trees.iter().map(|t| t.depth).max().unwrap_or(0))
}

/// The leaves that the lanes reach, counted from their roots.
///
/// `node` gets a lane and a place in its tree, `value` a lane and a feature. They need not look at bounds:
/// `pack` has made every child, and the one behind it, a node of the same tree (a leaf's is itself, and it
/// goes nowhere else), and no feature is beyond `features`, which `sum` holds the rows to.
#[inline]
fn descend<const MISSING: bool, const N: usize>(
    depth: u32,
    node: impl Fn(usize, u32) -> Node,
    value: impl Fn(usize, usize) -> f32,
) -> [u32; N] {
    let mut at = [0_u32; N];
    for _ in 0..depth {
        let mut inner = 0;
        for (j, at) in at.iter_mut().enumerate() {
            let node = node(j, *at);
            let value = value(j, (node.word >> FEATURE_AT) as usize % MAX_FEATURES);
            // A value that is not a number compares false, and so does not pass.
            let passes = value <= node.threshold
                || (MISSING && node.word & MISSING_PASSES != 0 && value.is_nan());
            let next = node.word % (1 << FEATURE_AT);
            *at = next + u32::from(!passes) * (node.word / INNER % 2);
            inner |= node.word & INNER;
        }
        if inner == 0 {
            break; // all have reached their leaves
        }
    }
    at
}
