//! From the sums of a forest's leaves to what ONNX's operators answer: for regressors the average and the
//! base values, for classifiers a label and the classes' scores. It follows ONNX Runtime, oddities
//! included, as models were made and tested with it.

/// ONNX's `post_transform`, those that are known here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    None,
    Logistic,
    Softmax,
}

impl Transform {
    /// As the operator's attribute numbers them.
    pub fn numbered(code: i64) -> Option<Self> {
        [Self::None, Self::Logistic, Self::Softmax]
            .get(usize::try_from(code).ok()?)
            .copied()
    }

    fn apply(self, scores: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Logistic => {
                for score in scores {
                    *score = logistic(*score);
                }
            }
            Self::Softmax => {
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for score in &mut *scores {
                    *score = (*score - most).exp();
                    sum += *score;
                }
                for score in scores {
                    *score /= sum;
                }
            }
        }
    }
}

/// Finishes a row's sums in place.
pub struct Regressor {
    /// One for each target, or none.
    pub base: Vec<f32>,
    /// Of how many trees to take the average; None = their sum.
    pub average: Option<f32>,
}

impl Regressor {
    /// Whether `finish` asks for the leaves that a target had.
    pub fn asks(&self) -> bool {
        self.base.len() > 1
    }

    /// `has`: of each target, whether a leaf had a weight for it; empty where nobody `asks`.
    pub fn finish(&self, sums: &mut [f32], has: &[bool]) {
        let each = self.base.len() == sums.len();
        for (i, sum) in sums.iter_mut().enumerate() {
            if let Some(trees) = self.average {
                *sum /= trees;
            }
            // A target without a leaf is nought, whatever its base value.
            if each && has.get(i).copied().unwrap_or(true) {
                *sum += self.base[i];
            }
        }
    }
}

/// Finishes a row's sums in place, and says its label.
pub struct Classifier {
    pub labels: Vec<i64>,
    /// One a class; for two classes there may be one alone; or none.
    pub base: Vec<f32>,
    pub transform: Transform,
    /// Two classes of which one alone has weights: the score of the other is its opposite.
    pub one_sided: bool,
    /// No weight is negative: the scores are probabilities.
    pub positive: bool,
}

/// How the score of a class that has no weights is made.
#[derive(Clone, Copy)]
enum Opposite {
    Unknown,
    OneMinus,
    Negative,
}

impl Classifier {
    /// `has`: of each class, whether a leaf had a weight for it.
    pub fn finish(&self, scores: &mut [f32], has: &[bool]) -> i64 {
        if scores.len() == 2 {
            return self.finish_two(scores, has[0], has[1]);
        }
        for (score, base) in scores.iter_mut().zip(&self.base) {
            *score += base;
        }
        let mut best = 0;
        let mut found = false;
        for i in 0..scores.len() {
            if (has[i] || !self.base.is_empty()) && (!found || scores[i] > scores[best]) {
                (best, found) = (i, true);
            }
        }
        self.transform.apply(scores);
        self.labels[best]
    }

    fn finish_two(&self, scores: &mut [f32], has_first: bool, has_second: bool) -> i64 {
        let mut opposite = Opposite::Unknown;
        match self.base.len() {
            2 if has_second => {
                scores[1] = self.base[1] + scores[0];
                scores[0] = -scores[1];
            }
            2 => {
                scores[0] += self.base[0];
                scores[1] += self.base[1];
            }
            1 => scores[0] += self.base[0],
            _ => opposite = Opposite::Negative,
        }
        let score = scores[usize::from(has_second)];
        let label = if !self.one_sided {
            i64::from(score > 0.0)
        } else if self.positive {
            opposite = Opposite::OneMinus;
            self.labels[usize::from(score > 0.5)]
        } else {
            opposite = Opposite::Negative;
            self.labels[usize::from(score > 0.0)]
        };
        if has_second || self.base.len() == 2 {
            for (score, has) in scores.iter_mut().zip([has_first, has_second]) {
                *score = if has { *score } else { 0.0 };
            }
            self.transform.apply(scores);
            return label;
        }
        let (first, second) = match (opposite, self.transform) {
            (Opposite::Unknown, _) => (score, 0.0),
            (Opposite::OneMinus, Transform::Logistic) => {
                let second = logistic(score);
                (1.0 - second, second)
            }
            (Opposite::OneMinus, _) => (1.0 - score, score),
            (Opposite::Negative, Transform::Logistic) => (logistic(-score), logistic(score)),
            (Opposite::Negative, _) => (-score, score),
        };
        scores.copy_from_slice(&[first, second]);
        label
    }
}

fn logistic(x: f32) -> f32 {
    let v = 1.0 / (1.0 + (-x.abs()).exp());
    if x < 0.0 { 1.0 - v } else { v }
}
