//! A C program, compiled with the generated header and linked with `libdrystone.so`.

use crate::MIB;
use crate::common::{TestCluster, temp_dir};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The directory of `libdrystone.so` that belongs to this test binary.
fn library_dir() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    for dir in [deps.parent().unwrap(), deps] {
        if dir.join("libdrystone.so").exists() {
            return dir.to_owned();
        }
    }
    panic!("no libdrystone.so near {}", exe.display());
}

#[test]
fn a_c_program_opens_an_image_and_does_io() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = temp_dir();
    let program = dir.path().join("smoke");
    let library = library_dir();
    let compiled = Command::new("cc")
        .args(["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-o"])
        .arg(&program)
        .arg(root.join("tests/native/smoke.c"))
        .arg("-I")
        .arg(root.join("../client/native/include"))
        .arg("-L")
        .arg(&library)
        .arg("-ldrystone")
        .arg(format!("-Wl,-rpath,{}", library.display()))
        .output()
        .expect("a C compiler");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let cluster = TestCluster::with_image(3, 8 * MIB);
    let ran = Command::new(&program).arg(cluster.fleet.cluster_flag()).arg("i").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out.trim() == "ok", "{out}{err}");
}
