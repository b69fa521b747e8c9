//! From a model's attributes to packed trees. What is built here is what `forest` walks without a look at its
//! bounds, so nothing gets in that is not a tree.

use std::collections::{HashMap, HashSet, VecDeque};

use super::forest::{Forest, MAX_FEATURES, MAX_NODES, Node, Tree};

/// What the operator's attributes say, named as in ONNX's `TreeEnsembleRegressor`.
#[derive(Default)]
pub struct Attributes {
    pub tree_ids: Vec<i64>,
    pub node_ids: Vec<i64>,
    pub feature_ids: Vec<i64>,
    pub values: Vec<f32>,
    /// Of each node: `MODE_LEAF`, `MODE_LEQ` or `MODE_LT`.
    pub modes: Vec<i64>,
    pub true_node_ids: Vec<i64>,
    pub false_node_ids: Vec<i64>,
    /// Empty: no missing value passes.
    pub missing_tracks_true: Vec<i64>,
    pub target_tree_ids: Vec<i64>,
    pub target_node_ids: Vec<i64>,
    pub target_ids: Vec<i64>,
    pub target_weights: Vec<f32>,
    pub targets: usize,
}

pub const MODE_LEAF: i64 = 0;
/// Values up to the threshold pass.
pub const MODE_LEQ: i64 = 1;
/// Values below the threshold pass.
pub const MODE_LT: i64 = 2;

/// Where weights are that leaves share: a forest grown to pure leaves has as many kinds as classes, and they
/// stay in the cache.
type Known = HashMap<Vec<(u32, u32)>, u32>;

/// Of a tree's leaves by node: targets and what it adds to them.
type Weights = HashMap<i64, Vec<(u32, f32)>>;

impl Forest {
    /// # Errors
    /// What the attributes lack, or say that no tree can be.
    pub fn new(a: &Attributes) -> Result<Self, String> {
        let n = a.tree_ids.len();
        let lengths = [
            a.node_ids.len(),
            a.feature_ids.len(),
            a.values.len(),
            a.modes.len(),
            a.true_node_ids.len(),
            a.false_node_ids.len(),
        ];
        let weights = a.target_weights.len();
        let of_weights = [
            a.target_tree_ids.len(),
            a.target_node_ids.len(),
            a.target_ids.len(),
        ];
        let missing = a.missing_tracks_true.len();
        if lengths.iter().any(|&l| l != n)
            || of_weights.iter().any(|&l| l != weights)
            || (missing != 0 && missing != n)
        {
            return Err("attributes differ in length".into());
        }
        if n == 0 || a.targets == 0 || n.max(weights) > u32::MAX as usize / 2 {
            return Err(format!("{n} nodes, {} targets", a.targets));
        }
        let mut made = Self {
            nodes: Vec::with_capacity(n),
            starts: vec![0],
            weights: Vec::with_capacity(if a.targets > 1 { weights } else { 0 }),
            targets: a.targets,
            missing: a.missing_tracks_true.contains(&1),
            ..Self::default()
        };
        let mut leaf_weights = weights_by_tree(a)?;
        let mut first = 0;
        let mut ids = HashSet::new();
        let mut known = Known::new();
        while first < n {
            let id = a.tree_ids[first];
            let len = a.tree_ids[first..].iter().take_while(|&&t| t == id).count();
            if !ids.insert(id) {
                return Err(format!("tree {id} is in two places"));
            }
            let own = leaf_weights.remove(&id).unwrap_or_default();
            made.add(a, first, len, &own, &mut known)?;
            first += len;
        }
        match leaf_weights.keys().next() {
            Some(id) => Err(format!("weights of tree {id}, which is not there")),
            None => Ok(made),
        }
    }

    /// Add the tree whose nodes are `len` from `first` on, the first of them its root.
    fn add(
        &mut self,
        a: &Attributes,
        first: usize,
        len: usize,
        leaf_weights: &Weights,
        known: &mut Known,
    ) -> Result<(), String> {
        let ids = &a.node_ids[first..first + len];
        let at: HashMap<i64, usize> = ids.iter().enumerate().map(|(i, &id)| (id, i)).collect();
        if at.len() != len {
            return Err("a node's id is in its tree twice".into());
        }
        if len > MAX_NODES {
            return Err(format!("a tree of {len} nodes"));
        }
        if let Some(id) = leaf_weights.keys().find(|&id| !at.contains_key(id)) {
            return Err(format!("weights of node {id}, which is not in its tree"));
        }
        let mut tree = vec![Node::default()];
        let (mut depth, mut seen) = (0, vec![false; len]);
        let mut queue = VecDeque::from([(0, 0, 0)]);
        while let Some((i, place, level)) = queue.pop_front() {
            let from = first + i;
            if std::mem::replace(&mut seen[i], true) {
                return Err("a node has two parents".into());
            }
            depth = depth.max(level);
            if a.modes[from] == MODE_LEAF {
                let own = leaf_weights.get(&ids[i]).map_or(&[][..], Vec::as_slice);
                tree[place] = Node::leaf(self.leaf(own, a.values[from], known), place);
                continue;
            }
            let feature = usize::try_from(a.feature_ids[from])
                .ok()
                .filter(|&f| f < MAX_FEATURES)
                .ok_or_else(|| format!("feature {}", a.feature_ids[from]))?;
            self.features = self.features.max(feature + 1);
            let threshold = match a.modes[from] {
                MODE_LEQ => a.values[from],
                // Below is up to the next number below; below the least there is none.
                MODE_LT if a.values[from] > f32::NEG_INFINITY => a.values[from].next_down(),
                MODE_LT => f32::NAN,
                other => return Err(format!("mode {other}")),
            };
            let next = tree.len();
            if next + 2 > len {
                return Err("a node has two parents".into());
            }
            let tracks = a.missing_tracks_true.get(from) == Some(&1);
            tree[place] = Node::inner(threshold, next, feature, tracks);
            tree.extend([Node::default(); 2]);
            for (child, place) in [(&a.true_node_ids, next), (&a.false_node_ids, next + 1)] {
                let id = child[from];
                let i = at
                    .get(&id)
                    .ok_or_else(|| format!("no node {id} in its tree"))?;
                queue.push_back((*i, place, level + 1));
            }
        }
        let start = self.nodes.len();
        self.nodes.extend(tree);
        self.trees.push(Tree {
            nodes: start..self.nodes.len(),
            depth,
        });
        Ok(())
    }

    /// What a leaf's node holds: its value, or where its weights are. `value`: the node's own, which
    /// ONNX Runtime takes for a single target's leaf that has no weight.
    fn leaf(&mut self, own: &[(u32, f32)], value: f32, known: &mut Known) -> f32 {
        if self.targets == 1 {
            return own.first().map_or(value, |w| w.1);
        }
        let key = own.iter().map(|w| (w.0, w.1.to_bits())).collect();
        let place = *known.entry(key).or_insert_with(|| {
            self.weights.extend(own);
            self.starts.push(self.weights.len() as u32);
            self.starts.len() as u32 - 2
        });
        f32::from_bits(place)
    }
}

fn weights_by_tree(a: &Attributes) -> Result<HashMap<i64, Weights>, String> {
    let mut out = HashMap::<i64, Weights>::new();
    for (i, &weight) in a.target_weights.iter().enumerate() {
        let target = a.target_ids[i];
        let target = u32::try_from(target)
            .ok()
            .filter(|&t| (t as usize) < a.targets)
            .ok_or_else(|| format!("target {target} of {}", a.targets))?;
        out.entry(a.target_tree_ids[i])
            .or_default()
            .entry(a.target_node_ids[i])
            .or_default()
            .push((target, weight));
    }
    Ok(out)
}
