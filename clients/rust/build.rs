//! Makes the messages and the stubs from the protos of the repository.
//!
//! protoc comes from PROTOC, else from the crate `protoc-bin-vendored`; google/api and google/rpc from UNDERSTUDY_GOOGLEAPIS, else from
//! build/googleapis of the repository (`make build/googleapis`).

use std::path::{Path, PathBuf};
use std::{env, error, fs};

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let protos = env::var_os("UNDERSTUDY_PROTOS").map_or_else(|| root.join("protos"), PathBuf::from);
    let google = env::var_os("UNDERSTUDY_GOOGLEAPIS").map_or_else(|| root.join("build/googleapis"), PathBuf::from);
    for name in ["PROTOC", "UNDERSTUDY_PROTOS", "UNDERSTUDY_GOOGLEAPIS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed={}", protos.display());
    let details = google.join("google/rpc/error_details.proto");
    if !details.exists() {
        return Err(format!(
            "{} is missing. Run `make build/googleapis` in the repository, or set UNDERSTUDY_GOOGLEAPIS to a folder that has it.",
            details.display()
        )
        .into());
    }
    let mut sources = vec![details];
    for file in fs::read_dir(protos.join("understudy/v1"))? {
        let path = file?.path();
        if path.extension().is_some_and(|ending| ending == "proto") {
            sources.push(path);
        }
    }
    sources.sort();
    let mut config = tonic_prost_build::Config::new();
    if env::var_os("PROTOC").is_none() {
        config.protoc_executable(protoc_bin_vendored::protoc_bin_path()?);
    }
    let well_known = protoc_bin_vendored::include_path()?;
    config.enable_type_names();
    tonic_prost_build::configure().build_server(false).include_file("protos.rs").compile_with_config(
        config,
        &sources,
        &[protos, google, well_known],
    )?;
    Ok(())
}
