//! Ensembles of decision trees, several times faster than ONNX Runtime's own operator: `pack` reads a
//! model's trees, `forest` walks them, `scores` makes labels and probabilities of their sums, `op` is the
//! operator that ONNX Runtime loads, by `ort`, its C interface. They hold to ONNX Runtime's results, bit
//! for bit where it adds in the trees' order.

pub mod ensemble;
pub mod forest;
mod op;
mod ort;
pub mod pack;
pub mod scores;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod wide;
