//! Against the servers that pytest starts, see tests/clients/test_languages.py: what Python's client was answered is what we must get.

use std::time::Duration;
use std::{env, fs, process};

use serde_json::Value;
use understudy::tonic::Code;
use understudy::tonic::metadata::MetadataMap;
use understudy::tonic::transport::{Certificate, ClientTlsConfig};
use understudy::v1::{
    ClassifyInput, ClassifyRequest, EmbedRequest, EmbedResponse, Feedback, GenerateRequest, ModelSelector, Sampling, Thumb,
    generate_request,
};
use understudy::{Client, Error, Options};

/// None where pytest did not start us: the test then says so, and passes.
fn setting(name: &str) -> Option<String> {
    let value = env::var(name).ok();
    if value.is_none() {
        eprintln!("skipped: {name} is not set; pytest sets it");
    }
    value
}

fn server() -> Option<(Client, Value)> {
    let options = Options { api_key: env::var("UNDERSTUDY_API_KEY").unwrap_or_default(), ..Default::default() };
    let client = Client::connect(&setting("UNDERSTUDY_ADDRESS")?, options).unwrap();
    let text = fs::read_to_string(setting("UNDERSTUDY_EXPECTED")?).unwrap();
    Some((client, serde_json::from_str(&text).unwrap()))
}

fn texts(expected: &Value, name: &str) -> Vec<String> {
    expected[name].as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned()).collect()
}

fn near(got: f32, wanted: &Value) {
    assert!((f64::from(got) - wanted.as_f64().unwrap()).abs() < 1e-6, "{got}, expected {wanted}");
}

fn model(name: &str) -> Option<ModelSelector> {
    Some(ModelSelector { name: name.into(), ..Default::default() })
}

fn prompt(text: &str, sampling: Sampling) -> GenerateRequest {
    GenerateRequest { input: Some(generate_request::Input::Prompt(text.into())), sampling: Some(sampling), ..Default::default() }
}

fn endless() -> GenerateRequest {
    prompt("tell", Sampling { temperature: Some(0.0), ignore_eos: true, ..Default::default() })
}

async fn embed(client: &Client, request: EmbedRequest) -> Result<EmbedResponse, Error> {
    client
        .call(request, |request| {
            let mut stub = client.inference();
            async move { stub.embed(request).await }
        })
        .await
}

#[tokio::test]
async fn embeddings_are_those_of_python() {
    let Some((client, expected)) = server() else { return };
    let vectors = client.embed(texts(&expected, "texts")).await.unwrap();
    let wanted = expected["embeddings"].as_array().unwrap();
    assert_eq!(vectors.len(), wanted.len());
    for (vector, wanted) in vectors.iter().zip(wanted) {
        assert_eq!(vector.len(), wanted.as_array().unwrap().len());
        vector.iter().zip(wanted.as_array().unwrap()).for_each(|(value, wanted)| near(*value, wanted));
    }
}

#[tokio::test]
async fn classes_are_those_of_python() {
    let Some((client, expected)) = server() else { return };
    let inputs = texts(&expected, "texts").into_iter().map(|text| ClassifyInput { text, ..Default::default() }).collect();
    let response = client
        .call(ClassifyRequest { inputs, ..Default::default() }, |request| {
            let mut stub = client.inference();
            async move { stub.classify(request).await }
        })
        .await
        .unwrap();
    for (i, result) in response.results.iter().enumerate() {
        assert_eq!(result.labels.len(), expected["labels"][i].as_array().unwrap().len());
        for (j, label) in result.labels.iter().enumerate() {
            assert_eq!(label.name, expected["labels"][i][j][0]);
            near(label.score, &expected["labels"][i][j][1]);
        }
    }
}

#[tokio::test]
async fn a_skill_answers_and_takes_feedback() {
    let Some((client, expected)) = server() else { return };
    let results = client.run(expected["skill"].as_str().unwrap(), texts(&expected, "texts")).await.unwrap();
    let answers: Vec<_> = results.iter().map(|one| one.output_text.clone()).collect();
    assert_eq!(answers, texts(&expected, "answers"));
    assert!(results.iter().all(|one| one.decision.as_ref().is_some_and(|decision| decision.local)));
    let said = Feedback {
        interaction_id: results[0].interaction_id.clone(),
        thumb: Thumb::Up.into(),
        comment: "from Rust".into(),
        ..Default::default()
    };
    let kept = client.feedback(said).await.unwrap();
    assert!(!kept.feedback_id.is_empty());
    assert_eq!(kept.comment, "from Rust");
}

#[tokio::test]
async fn a_stream_is_the_whole_text_of_the_same_seed() {
    let Some((client, expected)) = server() else { return };
    let given = &expected["sampling"];
    let sampling = Sampling {
        temperature: given["temperature"].as_f64().map(|value| value as f32),
        seed: given["seed"].as_i64(),
        max_tokens: given["max_tokens"].as_i64().unwrap().try_into().unwrap(),
        ..Default::default()
    };
    let mut request = prompt(expected["prompt"].as_str().unwrap(), sampling);
    request.model = model(expected["model"].as_str().unwrap());
    let mut generation = client.generate(request).await.unwrap();
    let (mut text, mut tokens) = (String::new(), 0);
    while let Some(response) = generation.next().await {
        let response = response.unwrap();
        response.deltas.iter().for_each(|delta| text += &delta.text);
        tokens = response.usage.map_or(tokens, |usage| usage.output_tokens);
    }
    assert_eq!(text, expected["text"]);
    assert_eq!(tokens, given["max_tokens"]);
}

#[tokio::test]
async fn an_unknown_model_has_its_reason() {
    let Some((client, _)) = server() else { return };
    let request = EmbedRequest { model: model("nobody"), texts: vec!["x".into()], ..Default::default() };
    let error = embed(&client, request).await.unwrap_err();
    assert_eq!((error.code, error.reason.as_str(), error.metadata["model"].as_str()), (Code::NotFound, "MODEL_NOT_FOUND", "nobody"));
    assert!(!error.request_id.is_empty());
    assert!(error.to_string().contains("MODEL_NOT_FOUND"));
    let request = GenerateRequest { model: model("nobody"), ..prompt("x", Sampling::default()) };
    let error = match client.generate(request).await {
        Ok(mut generation) => generation.next().await.unwrap().unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.reason, "MODEL_NOT_FOUND");
    let error = client.embed(["fine", ""]).await.unwrap_err();
    assert_eq!((error.code, error.reason.as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT"));
}

#[tokio::test]
async fn a_deadline_says_where() {
    let Some((client, _)) = server() else { return };
    let mut generation = client.with_timeout(Duration::from_millis(100)).generate(endless()).await.unwrap();
    let error = loop {
        match generation.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("it ended without an error"),
        }
    };
    assert_eq!((error.code, error.reason.as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"));
    assert!(!error.metadata["stage"].is_empty());
    assert!(generation.next().await.is_none());
    let request = EmbedRequest { texts: vec!["x".into(); 100], ..Default::default() };
    let error = embed(&client.with_timeout(Duration::from_micros(100)), request).await.unwrap_err();
    assert_eq!((error.code, error.reason.as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"));
    assert!(!error.metadata["stage"].is_empty());
}

#[tokio::test]
async fn dropping_a_stream_ends_it() {
    let Some((client, _)) = server() else { return };
    // More than run at once: places that were not freed would keep the later ones from starting for 2,000 tokens of each before them.
    for _ in 0..12 {
        let mut generation = client.generate(endless()).await.unwrap();
        while let Some(response) = generation.next().await {
            if !response.unwrap().deltas.is_empty() {
                break;
            }
        }
    }
}

#[tokio::test]
async fn key_metadata_and_deadline_go_with_every_call() {
    let Some(address) = setting("UNDERSTUDY_SCRIPTED") else { return };
    let mut metadata = MetadataMap::new();
    metadata.insert("x-request-id", "rust-1".parse().unwrap());
    let options = Options { api_key: "und_a_b".into(), metadata, ..Default::default() };
    assert!(!format!("{options:?}").contains("und_a_b"));
    let client = Client::connect(&address, options).unwrap();
    let response = embed(&client, EmbedRequest { texts: vec!["ok:rust".into()], ..Default::default() }).await.unwrap();
    let seen = response.model.unwrap();
    assert_eq!((seen.name.as_str(), seen.version.as_str()), ("Bearer und_a_b", "rust-1"));
    assert!((30_000..=60_000).contains(&response.usage.unwrap().input_tokens));
    assert!(!format!("{client:?}").contains("und_a_b"));
}

#[tokio::test]
async fn a_call_without_a_key_is_refused() {
    let (Some(address), Some(_)) = (setting("UNDERSTUDY_ADDRESS"), setting("UNDERSTUDY_API_KEY")) else { return };
    let client = Client::connect(&address, Options::default()).unwrap();
    let error = client.embed(["x"]).await.unwrap_err();
    assert_eq!((error.code, error.reason.as_str()), (Code::Unauthenticated, "UNAUTHENTICATED"));
}

#[tokio::test]
async fn encryption() {
    let (Some(address), Some(file)) = (setting("UNDERSTUDY_SCRIPTED_TLS"), setting("UNDERSTUDY_CA")) else { return };
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(fs::read(file).unwrap()));
    let client = Client::connect(&address, Options { tls: Some(tls), ..Default::default() }).unwrap();
    assert_eq!(client.embed(["ok:rust-tls"]).await.unwrap().len(), 1);
    let stranger = Options { tls: Some(ClientTlsConfig::new().with_native_roots()), ..Default::default() };
    let error = Client::connect(&address, stranger).unwrap().embed(["ok:rust-tls"]).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
}

#[tokio::test]
async fn what_is_sent_again() {
    let Some(address) = setting("UNDERSTUDY_SCRIPTED") else { return };
    let client = Client::connect(&address, Options::default()).unwrap();
    for (what, times) in [("again", 3.0), ("full", 2.0)] {
        let vectors = client.embed([format!("{what}:rust-{what}-{}", process::id())]).await.unwrap();
        assert_eq!(vectors[0], [times]);
    }
    for what in ["plain", "paid", "later"] {
        let name = format!("rust-{what}-{}", process::id());
        let error = client.embed([format!("{what}:{name}")]).await.unwrap_err();
        assert_eq!((error.code, error.metadata["model"].as_str()), (Code::Unavailable, "scripted"));
        assert_eq!(client.embed([format!("ok:{name}")]).await.unwrap()[0], [2.0], "{what} was sent again");
    }
    let kept = client.feedback(Feedback { interaction_id: "one".into(), rating: Some(5), ..Default::default() }).await.unwrap();
    assert_eq!(kept.feedback_id.len(), 32);
}
