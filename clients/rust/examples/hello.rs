use understudy::{Client, Options};

#[tokio::main]
async fn main() -> Result<(), understudy::Error> {
    let client = Client::connect("127.0.0.1:50051", Options::default())?;
    let vectors = client.embed(["Where is my card?", "I lost my wallet"]).await?;
    println!("{} vectors of {}", vectors.len(), vectors[0].len());
    Ok(())
}
