use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::generation::Generation;
use crate::policy::{Headers, random, spread};
use crate::v1::admin_service_client::AdminServiceClient;
use crate::v1::ensemble_service_client::EnsembleServiceClient;
use crate::v1::feedback_service_client::FeedbackServiceClient;
use crate::v1::inference_service_client::InferenceServiceClient;
use crate::v1::model_service_client::ModelServiceClient;
use crate::v1::skill_service_client::SkillServiceClient;
use crate::v1::stats_service_client::StatsServiceClient;
use crate::v1::training_service_client::TrainingServiceClient;
use crate::v1::{self, run_input};
use crate::{Error, ProtoStatus};

/// What the stubs send through.
pub type Service = InterceptedService<Channel, Headers>;

/// Options of a connection; the default is one without encryption and without a key.
#[derive(Clone)]
pub struct Options {
    /// Sent with every call as a bearer token.
    pub api_key: String,
    /// Encrypts, for example `ClientTlsConfig::new().with_native_roots()`.
    #[cfg(feature = "tls")]
    pub tls: Option<tonic::transport::ClientTlsConfig>,
    /// Bounds a call of a method with all its attempts; 60 s by default.
    pub timeout: Duration,
    /// How often a call is sent at most, the first time included; 4 by default. Streams are sent once.
    pub attempts: u32,
    /// Sent with every call.
    pub metadata: MetadataMap,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            api_key: String::new(),
            #[cfg(feature = "tls")]
            tls: None,
            timeout: Duration::from_secs(60),
            attempts: 4,
            metadata: MetadataMap::new(),
        }
    }
}

impl fmt::Debug for Options {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("timeout", &self.timeout).field("attempts", &self.attempts).finish_non_exhaustive()
    }
}

/// One connection to a server. Clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    service: Service,
    timeout: Duration,
    attempts: u32,
}

macro_rules! stubs {
    ($($(#[$doc:meta])* $name:ident: $stub:ident;)*) => {$(
        $(#[$doc])*
        pub fn $name(&self) -> $stub<Service> {
            // Answers are as large as the caller asked for; the server bounds what it takes, and says so.
            $stub::new(self.service.clone()).max_decoding_message_size(usize::MAX).max_encoding_message_size(usize::MAX)
        }
    )*};
}

impl Client {
    /// A client of the server at an address such as "127.0.0.1:50051", within a tokio runtime. Nothing is sent before the first call.
    pub fn connect(address: &str, options: Options) -> Result<Self, Error> {
        let headers = Headers::new(&options)?;
        #[cfg(feature = "tls")]
        let secure = options.tls.is_some();
        #[cfg(not(feature = "tls"))]
        let secure = false;
        let uri = format!("{}://{address}", if secure { "https" } else { "http" });
        let refused = |error: tonic::transport::Error| Error::invalid(format!("no connection to {address:?} can be made: {error}"));
        let endpoint = Endpoint::from_shared(uri).map_err(refused)?;
        #[cfg(feature = "tls")]
        let endpoint = match options.tls {
            Some(tls) => endpoint.tls_config(tls).map_err(refused)?,
            None => endpoint,
        };
        let service = InterceptedService::new(endpoint.connect_lazy(), headers);
        Ok(Self { service, timeout: options.timeout, attempts: options.attempts })
    }

    /// The same connection with another deadline.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    stubs! {
        /// The stub of InferenceService. Stubs have no deadline of their own and send once: see [`Client::call`].
        inference: InferenceServiceClient;
        /// The stub of FeedbackService.
        feedback_service: FeedbackServiceClient;
        /// The stub of SkillService.
        skills: SkillServiceClient;
        /// The stub of ModelService.
        models: ModelServiceClient;
        /// The stub of TrainingService.
        training: TrainingServiceClient;
        /// The stub of StatsService.
        stats: StatsServiceClient;
        /// The stub of EnsembleService.
        ensembles: EnsembleServiceClient;
        /// The stub of AdminService.
        admin: AdminServiceClient;
    }

    /// Calls a method of a stub with the client's deadline, retries and errors:
    /// `client.call(request, |r| { let mut stub = client.inference(); async move { stub.classify(r).await } })`.
    pub async fn call<T, R, F>(&self, message: T, method: impl Fn(Request<T>) -> F) -> Result<R, Error>
    where
        T: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let end = Instant::now() + self.timeout;
        let mut attempt = 1;
        loop {
            let mut request = Request::new(message.clone());
            request.set_timeout(end.saturating_duration_since(Instant::now()));
            let error = match tokio::time::timeout_at(end, method(request)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => Error::from(status),
                Err(_) => return Err(Error::late()),
            };
            let wait = spread(error.retry_after.unwrap_or_default());
            if !error.is_retryable() || attempt >= self.attempts || Instant::now() + wait >= end {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    /// A vector for each text, in order, by the server's default model. Where an item has none its error is returned; ask the stub for models,
    /// sizes and the other items.
    pub async fn embed<S: Into<String>>(&self, texts: impl IntoIterator<Item = S>) -> Result<Vec<Vec<f32>>, Error> {
        let request = v1::EmbedRequest { texts: texts.into_iter().map(Into::into).collect(), ..Default::default() };
        let response = self
            .call(request, |request| {
                let mut stub = self.inference();
                async move { stub.embed(request).await }
            })
            .await?;
        response.results.into_iter().map(|result| item(result.error, result.embedding)).collect()
    }

    /// A skill's answers about texts, with their route, cost, quality and interaction id. Of an item that failed, `error` is set.
    pub async fn run<S: Into<String>>(&self, skill: &str, texts: impl IntoIterator<Item = S>) -> Result<Vec<v1::RunResult>, Error> {
        let input = |text: S| v1::RunInput { input: Some(run_input::Input::Text(text.into())) };
        let request = v1::RunRequest { skill: skill.into(), inputs: texts.into_iter().map(input).collect(), ..Default::default() };
        let response = self
            .call(request, |request| {
                let mut stub = self.inference();
                async move { stub.run(request).await }
            })
            .await?;
        Ok(response.results)
    }

    /// An answer as it is written; all but `deltas` is set in the last message alone. Dropping it ends the work.
    pub async fn generate(&self, request: v1::GenerateRequest) -> Result<Generation, Error> {
        let end = Instant::now() + self.timeout;
        let mut asked = Request::new(request);
        asked.set_timeout(self.timeout);
        let mut stub = self.inference();
        match tokio::time::timeout_at(end, stub.generate(asked)).await {
            Ok(response) => Ok(Generation::new(response?.into_inner(), end)),
            Err(_) => Err(Error::late()),
        }
    }

    /// Says something of an answer. It is kept once, however often it has to be sent.
    pub async fn feedback(&self, feedback: v1::Feedback) -> Result<v1::Feedback, Error> {
        let request_id = format!("{:016x}{:016x}", random(), random());
        let request = v1::CreateFeedbackRequest { feedback: Some(feedback), request_id, ..Default::default() };
        let response = self
            .call(request, |request| {
                let mut stub = self.feedback_service();
                async move { stub.create_feedback(request).await }
            })
            .await?;
        Ok(response.feedback.unwrap_or_default())
    }
}

fn item<T>(error: Option<ProtoStatus>, value: T) -> Result<T, Error> {
    error.map_or(Ok(value), |status| Err(Error::from_proto(&status)))
}
