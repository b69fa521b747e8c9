//! The limit of gRPC on this machine: tonic, one thread, with nothing behind it.
//!
//! `bench.Echo/Call` gives floats back. `inference.GRPCInferenceService/ModelInfer` parses the
//! standard's request and answers with its raw tensor: the messages that servers get, without a model.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
struct Floats {
    #[prost(float, repeated, tag = "1")]
    values: Vec<f32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Tensor {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    datatype: String,
    #[prost(int64, repeated, tag = "3")]
    shape: Vec<i64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct InferRequest {
    #[prost(string, tag = "1")]
    model_name: String,
    #[prost(message, repeated, tag = "5")]
    inputs: Vec<Tensor>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    raw_input_contents: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct InferResponse {
    #[prost(string, tag = "1")]
    model_name: String,
    #[prost(message, repeated, tag = "5")]
    outputs: Vec<Tensor>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    raw_output_contents: Vec<Vec<u8>>,
}

struct Same;

impl UnaryService<Floats> for Same {
    type Response = Floats;
    type Future = Ready<Result<Response<Floats>, Status>>;

    fn call(&mut self, request: Request<Floats>) -> Self::Future {
        ready(Ok(Response::new(request.into_inner())))
    }
}

impl UnaryService<InferRequest> for Same {
    type Response = InferResponse;
    type Future = Ready<Result<Response<InferResponse>, Status>>;

    fn call(&mut self, request: Request<InferRequest>) -> Self::Future {
        let given = request.into_inner();
        ready(Ok(Response::new(InferResponse {
            model_name: given.model_name,
            outputs: given.inputs,
            raw_output_contents: given.raw_input_contents,
        })))
    }
}

/// Both methods; `N` tells under which service's name it stands in the router.
#[derive(Clone)]
struct Echo<const N: u8>;

impl NamedService for Echo<0> {
    const NAME: &'static str = "bench.Echo";
}

impl NamedService for Echo<1> {
    const NAME: &'static str = "inference.GRPCInferenceService";
}

impl<const N: u8> Service<http::Request<Body>> for Echo<N> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            Ok(match N {
                0 => Grpc::new(ProstCodec::<Floats, Floats>::default()).unary(Same, request).await,
                _ => {
                    let codec = ProstCodec::<InferResponse, InferRequest>::default();
                    Grpc::new(codec).unary(Same, request).await
                }
            })
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let port = std::env::args().nth(1).ok_or("echo PORT")?;
    tonic::transport::Server::builder()
        .add_service(Echo::<0>)
        .add_service(Echo::<1>)
        .serve(format!("127.0.0.1:{port}").parse()?)
        .await?;
    Ok(())
}
