//! Forebay's fast lane: terminates gRPC's HTTP/2, gives Python all waiting calls as one batch, and
//! takes the answers back. It knows no contract: bytes in, bytes out. Calls of other methods go
//! through to the ordinary lane over a Unix socket, unchanged. So it does with some routes of HTTP/1.1 and
//! with the gateway. Beside it, `split` takes many messages apart at one of their fields, and `rows` and
//! `columns` read tables from the pieces. There is an operator for ONNX Runtime, `trees`; and with all of these,
//! `lease` answers small tables by itself, for as long as Python lets it.

pub mod call;
pub mod columns;
pub mod connection;
pub mod cork;
pub mod frame;
pub mod gateway;
pub mod http1;
pub mod inbox;
pub mod lease;
pub mod metadata;
pub mod ordinary;
#[cfg(feature = "python")]
mod python;
pub mod reply;
pub mod rows;
pub mod server;
pub mod shed;
pub mod split;
pub mod status;
pub mod stream;
pub mod tls;
pub mod trees;
pub mod wire;
