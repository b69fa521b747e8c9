//! A single row's walk, eight trees to a register, where the processor has AVX2: it takes half of the time of
//! the plain one. The same nodes, the same comparisons, and so the same leaves. (Rows that go down a tree
//! together gain hardly anything by it: they wait for their values, which a single row has in a register.)

#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256, __m256i, _CMP_LE_OQ, _CMP_UNORD_Q, _mm256_add_epi32, _mm256_and_ps, _mm256_and_si256,
    _mm256_andnot_si256, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmp_ps,
    _mm256_i32gather_epi32, _mm256_i32gather_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_or_ps,
    _mm256_or_si256, _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_setzero_si256,
    _mm256_srai_epi32, _mm256_srli_epi32, _mm256_storeu_si256, _mm256_testz_si256,
};

use super::forest::{FEATURE_AT, INNER, MAX_FEATURES, Node};

/// Lanes of a register, and registers that go down together.
const WIDTH: usize = 8;
const REGISTERS: usize = 4;
/// Trees that go down together.
pub(super) const LANES: usize = WIDTH * REGISTERS;

/// Whether the processor can.
pub(super) fn can() -> bool {
    is_x86_feature_detected!("avx2")
}

/// The nodes that a row reaches from these roots.
///
/// # Safety
/// The processor `can`. Roots are of trees of `pack`, whose children are nodes of the same tree, and whose
/// features are within the row; there are fewer than 2^31 nodes.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn descend<const MISSING: bool>(
    nodes: &[Node],
    roots: &[u32; LANES],
    depth: u32,
    row: &[f32],
) -> [u32; LANES] {
    if row.len() <= WIDTH {
        let mut own = [0.0; WIDTH];
        own[..row.len()].copy_from_slice(row);
        unsafe {
            let own = _mm256_loadu_ps(own.as_ptr());
            let value = |feature| _mm256_permutevar8x32_ps(own, feature);
            walk::<MISSING>(nodes, roots, depth, value)
        }
    } else {
        unsafe {
            let value = |feature| _mm256_i32gather_ps::<4>(row.as_ptr(), feature);
            walk::<MISSING>(nodes, roots, depth, value)
        }
    }
}

/// As `descend`; `value` gets the features that lanes ask for.
#[inline]
#[target_feature(enable = "avx2")]
#[allow(clippy::cast_possible_wrap)]
unsafe fn walk<const MISSING: bool>(
    nodes: &[Node],
    roots: &[u32; LANES],
    depth: u32,
    value: impl Fn(__m256i) -> __m256,
) -> [u32; LANES] {
    let thresholds = nodes.as_ptr().cast::<f32>();
    let words = unsafe { nodes.as_ptr().cast::<i32>().add(1) };
    let (roots, _) = roots.as_chunks::<WIDTH>();
    let roots: [__m256i; REGISTERS] =
        std::array::from_fn(|v| unsafe { _mm256_loadu_si256(roots[v].as_ptr().cast()) });
    let places = _mm256_set1_epi32((1 << FEATURE_AT) - 1);
    let features = _mm256_set1_epi32(MAX_FEATURES as i32 - 1);
    let inner = _mm256_set1_epi32(INNER as i32);
    let one = _mm256_set1_epi32(1);
    let mut at = roots;
    for _ in 0..depth {
        let mut any = _mm256_setzero_si256();
        for (at, root) in at.iter_mut().zip(roots) {
            let word = unsafe { _mm256_i32gather_epi32::<8>(words, *at) };
            let threshold = unsafe { _mm256_i32gather_ps::<8>(thresholds, *at) };
            let feature = _mm256_srli_epi32::<{ FEATURE_AT as i32 }>(word);
            let value = value(_mm256_and_si256(feature, features));
            // A value that is not a number compares false, and so does not pass.
            let mut passes = _mm256_cmp_ps::<_CMP_LE_OQ>(value, threshold);
            if MISSING {
                let missing = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
                let tracks = _mm256_castsi256_ps(_mm256_srai_epi32::<31>(word));
                passes = _mm256_or_ps(passes, _mm256_and_ps(missing, tracks));
            }
            let is_inner = _mm256_and_si256(_mm256_srli_epi32::<30>(word), one);
            let other = _mm256_andnot_si256(_mm256_castps_si256(passes), is_inner);
            let next = _mm256_add_epi32(_mm256_and_si256(word, places), other);
            *at = _mm256_add_epi32(root, next);
            any = _mm256_or_si256(any, word);
        }
        if _mm256_testz_si256(any, inner) == 1 {
            break; // all have reached their leaves
        }
    }
    let mut out = [0; LANES];
    for (at, out) in at.into_iter().zip(out.chunks_exact_mut(WIDTH)) {
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), at) };
    }
    out
}
