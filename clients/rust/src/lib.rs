//! The client of Understudy, the inference server whose local models learn to replace API models.
//!
//! [`Client`] has a method for what is asked most, and the stubs of every service behind it. Every call fails with [`Error`]: the gRPC code,
//! the server's own reason, what varies in it, and when to try again.

mod client;
mod error;
mod generation;
mod policy;

pub use client::{Client, Options, Service};
pub use error::Error;
pub use generation::Generation;
pub use tonic;

#[allow(clippy::all, dead_code)]
mod protos {
    tonic::include_proto!("protos");
}

/// Messages and stubs of the protos.
pub use protos::understudy::v1;

pub(crate) use protos::google::rpc;
/// An item's error as it comes: [`Error::from_proto`] reads it.
pub use protos::google::rpc::Status as ProtoStatus;
