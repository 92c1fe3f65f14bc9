use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::{Error, Options};

/// Puts the connection's key and metadata into every call. A value that the call has itself stays.
#[derive(Debug, Clone)]
pub struct Headers(MetadataMap);

impl Headers {
    pub(crate) fn new(options: &Options) -> Result<Self, Error> {
        let mut metadata = options.metadata.clone();
        if !options.api_key.is_empty() {
            let mut value = AsciiMetadataValue::try_from(format!("Bearer {}", options.api_key))
                .map_err(|_| Error::invalid("the API key has characters that no key has; expected printable ASCII".into()))?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        Ok(Self(metadata))
    }
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for entry in self.0.iter() {
            if let tonic::metadata::KeyAndValueRef::Ascii(key, value) = entry
                && !request.metadata().contains_key(key)
            {
                request.metadata_mut().insert(key, value.clone());
            }
        }
        Ok(request)
    }
}

/// The wait that the server asks for and up to a quarter more, so that those that were refused together do not come back together.
pub(crate) fn spread(wait: Duration) -> Duration {
    wait + wait.mul_f64(0.25 * (random() as f64 / u64::MAX as f64))
}

/// The standard library seeds its hashes from the system's source of randomness.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0)
}
