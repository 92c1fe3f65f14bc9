use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use prost::{Message, Name};
use prost_types::Any;
use tonic::Code;

use crate::rpc;

const REQUEST_ID: &str = "x-request-id";

/// What a call, or an item of a batch, failed with.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Error {
    /// gRPC's code.
    pub code: Code,
    /// What was wrong, what was expected, and how to mend it.
    pub message: String,
    /// The server's own, finer code, for example "MODEL_NOT_FOUND": the values of `ErrorReason` without their prefix. Empty where the server
    /// did not answer.
    pub reason: String,
    /// What varies in the message. Of a deadline "stage" says where it passed; "client" where no answer came in time.
    pub metadata: HashMap<String, String>,
    /// For the operator of the server.
    pub request_id: String,
    /// The wait that the server asks for.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// The error of an item of a batch: its field `error`.
    pub fn from_proto(status: &rpc::Status) -> Self {
        let mut error = Self::bare(Code::from_i32(status.code), status.message.clone());
        error.read(&status.details);
        error.named()
    }

    /// The part of the request that is to blame, or "".
    pub fn field(&self) -> &str {
        self.metadata.get("field").map_or("", String::as_str)
    }

    /// Whether sending the same again is safe and may help: the server says when, so it has not begun. What providers failed at may have been
    /// paid.
    pub fn is_retryable(&self) -> bool {
        let refused = matches!(self.code, Code::Unavailable | Code::ResourceExhausted);
        refused && self.retry_after.is_some() && self.reason != "PROVIDER_UNAVAILABLE"
    }

    /// Where the client's own clock ran out first.
    pub(crate) fn late() -> Self {
        Self::bare(Code::DeadlineExceeded, "the deadline passed before the answer came".into()).named()
    }

    pub(crate) fn invalid(message: String) -> Self {
        let mut error = Self::bare(Code::InvalidArgument, message);
        error.reason = "INVALID_ARGUMENT".into();
        error
    }

    fn bare(code: Code, message: String) -> Self {
        Self { code, message, reason: String::new(), metadata: HashMap::new(), request_id: String::new(), retry_after: None }
    }

    fn read(&mut self, details: &[Any]) {
        for detail in details {
            if let Some(info) = unpack::<rpc::ErrorInfo>(detail) {
                (self.reason, self.metadata) = (info.reason, info.metadata);
            } else if let Some(retry) = unpack::<rpc::RetryInfo>(detail) {
                self.retry_after = retry.retry_delay.and_then(|delay| delay.try_into().ok());
            } else if let Some(request) = unpack::<rpc::RequestInfo>(detail) {
                self.request_id = request.request_id;
            }
        }
    }

    /// Errors of the client's own get reasons too.
    fn named(mut self) -> Self {
        if self.reason.is_empty() && self.code == Code::DeadlineExceeded {
            self.reason = "DEADLINE_EXCEEDED".into();
            self.metadata.insert("stage".into(), "client".into());
        } else if self.reason.is_empty() && self.code == Code::Cancelled {
            self.reason = "CANCELLED".into();
        }
        self
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        let mut error = Self::bare(status.code(), status.message().to_owned());
        if let Some(id) = status.metadata().get(REQUEST_ID).and_then(|value| value.to_str().ok()) {
            error.request_id = id.to_owned();
        }
        // Where the details are no Status they are a proxy's, not the server's.
        if let Ok(found) = rpc::Status::decode(status.details()) {
            error.read(&found.details);
        }
        // tonic calls its own timeout so.
        if error.code == Code::Cancelled && error.reason.is_empty() && error.message == "Timeout expired" {
            return Self::late();
        }
        error.named()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason.as_str() {
            "" => write!(f, "{:?}: {}", self.code, self.message),
            reason => write!(f, "{:?} ({reason}): {}", self.code, self.message),
        }
    }
}

impl std::error::Error for Error {}

fn unpack<T: Message + Name + Default>(detail: &Any) -> Option<T> {
    let same = detail.type_url.rsplit('/').next() == Some(T::full_name().as_str());
    if same { T::decode(detail.value.as_slice()).ok() } else { None }
}
