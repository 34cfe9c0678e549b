//! `include/drystone.h` is what the source says.

#![allow(clippy::expect_used, reason = "a test that cannot go on shall panic")]

use std::path::Path;

#[test]
fn the_header_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut text = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/capi.rs"))
        .generate()
        .expect("a header can be made")
        .write(&mut text);
    let path = root.join("include/drystone.h");
    if std::env::var_os("DRYSTONE_WRITE_HEADER").is_some() {
        std::fs::write(&path, &text).expect("written");
    }
    let stored = std::fs::read(&path).unwrap_or_default();
    assert!(stored == text, "{} is old: run `make header`", path.display());
}
