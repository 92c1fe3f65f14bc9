use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Streaming;

use crate::Error;
use crate::v1::GenerateResponse;

/// An answer that is being written: a [`Stream`], or `while let Some(response) = generation.next().await`. Dropping it ends the work.
#[derive(Debug)]
pub struct Generation {
    messages: Option<Streaming<GenerateResponse>>,
    clock: Pin<Box<Sleep>>,
}

impl Generation {
    pub(crate) fn new(messages: Streaming<GenerateResponse>, end: Instant) -> Self {
        Self { messages: Some(messages), clock: Box::pin(sleep_until(end)) }
    }

    /// The next message; None after the last, and after an error.
    pub async fn next(&mut self) -> Option<Result<GenerateResponse, Error>> {
        poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }
}

impl Stream for Generation {
    type Item = Result<GenerateResponse, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(messages) = self.messages.as_mut() else {
            return Poll::Ready(None);
        };
        let error = match Pin::new(messages).poll_next(context) {
            Poll::Ready(Some(Ok(response))) => return Poll::Ready(Some(Ok(response))),
            Poll::Ready(Some(Err(status))) => Some(Err(status.into())),
            Poll::Ready(None) => None,
            Poll::Pending if self.clock.as_mut().poll(context).is_ready() => Some(Err(Error::late())),
            Poll::Pending => return Poll::Pending,
        };
        self.messages = None;
        Poll::Ready(error)
    }
}
