//! Every kind of call: `cargo run --example tour`, with UNDERSTUDY_ADDRESS and UNDERSTUDY_API_KEY where they are not the defaults.

use std::env;
use std::error::Error as StdError;
use std::io::Write;
use std::time::Duration;

use understudy::tonic::Code;
use understudy::v1::{EmbedRequest, Feedback, GenerateRequest, ModelSelector, Sampling, Thumb, generate_request};
use understudy::{Client, Error, Options};

#[tokio::main]
async fn main() -> Result<(), Box<dyn StdError>> {
    let address = env::var("UNDERSTUDY_ADDRESS").unwrap_or_else(|_| "127.0.0.1:50051".into());
    let api_key = env::var("UNDERSTUDY_API_KEY").unwrap_or_default();
    let client = Client::connect(&address, Options { api_key, ..Default::default() })?;

    let vectors = client.embed(["where is my card ?", "how do i reset my password ?", "money transfer late"]).await?;
    println!("{} vectors of {}", vectors.len(), vectors[0].len());

    let prompt = |sampling| GenerateRequest {
        input: Some(generate_request::Input::Prompt("tell".into())),
        sampling: Some(sampling),
        ..Default::default()
    };
    let mut answer = client.generate(prompt(Sampling { temperature: Some(0.0), max_tokens: 12, ..Default::default() })).await?;
    while let Some(response) = answer.next().await {
        for delta in response?.deltas {
            print!("{}", delta.text);
            std::io::stdout().flush()?;
        }
    }
    println!();

    let results = client.run("text-classification", ["where is my card ?"]).await?;
    if let Some(status) = &results[0].error {
        return Err(Error::from_proto(status).into());
    }
    println!("{}, by {}", results[0].output_text, results[0].decision.as_ref().map_or("nobody", |decision| &decision.candidate));
    let said = Feedback { interaction_id: results[0].interaction_id.clone(), thumb: Thumb::Up.into(), ..Default::default() };
    println!("feedback {}", client.feedback(said).await?.feedback_id);

    let nobody = EmbedRequest {
        model: Some(ModelSelector { name: "nobody".into(), ..Default::default() }),
        texts: vec!["x".into()],
        ..Default::default()
    };
    let asked = client.call(nobody, |request| {
        let mut stub = client.inference();
        async move { stub.embed(request).await }
    });
    match asked.await {
        Err(error) if error.code == Code::NotFound => println!("{} {}", error.reason, error.metadata["model"]), // MODEL_NOT_FOUND nobody
        other => println!("{other:?}"),
    }

    let hasty = client.with_timeout(Duration::from_millis(50));
    let mut endless = hasty.generate(prompt(Sampling { ignore_eos: true, ..Default::default() })).await?;
    while let Some(response) = endless.next().await {
        match response {
            Ok(_) => {}
            Err(error) if error.code == Code::DeadlineExceeded => println!("{} in the stage {}", error.reason, error.metadata["stage"]),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
