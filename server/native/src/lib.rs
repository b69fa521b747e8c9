//! Forebay's fast lane: terminates gRPC's HTTP/2, gives Python all waiting calls as one batch, and
//! takes the answers back. It knows no contract: bytes in, bytes out. Calls of other methods go
//! through to the ordinary lane over a Unix socket, unchanged. Beside it, `rows` reads
//! google.protobuf.Struct for many rows at once.

pub mod connection;
pub mod frame;
pub mod inbox;
pub mod metadata;
pub mod ordinary;
#[cfg(feature = "python")]
mod python;
pub mod reply;
pub mod rows;
pub mod server;
pub mod status;
pub mod tls;
