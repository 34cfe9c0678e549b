//! Debian packages, with lists and sources of our own: the machine's stay as they are.
//!
//! The mirror's address comes from the machine's configuration: what serves its own release serves others.

use crate::error::GuestError;
use crate::program;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the machine's sources are.
const ETC_APT: &str = "/etc/apt";
/// Names the machine's release.
const OS_RELEASE: &str = "/etc/os-release";

/// apt with some suites of one mirror.
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Its files lie in `dir`; the lists are fetched.
    pub fn with(dir: &Path, suites: &[&str]) -> Result<Self, GuestError> {
        let mirror = mirror(Path::new(ETC_APT), &codename()?)?;
        for part in ["lists/partial", "cache/archives/partial", "parts"] {
            let path = dir.join(part);
            std::fs::create_dir_all(&path).map_err(GuestError::io(format!("make {}", path.display())))?;
        }
        let lines: String = suites.iter().map(|suite| format!("deb {mirror} {suite} main\n")).collect();
        let sources = dir.join("sources.list");
        std::fs::write(&sources, lines).map_err(GuestError::io(format!("write {}", sources.display())))?;
        let apt = Self { dir: dir.to_path_buf() };
        program::run(apt.options(&mut Command::new("apt-get")).args(["update", "-qq"]))?;
        Ok(apt)
    }

    fn options<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let own = |key: &str, part: &str| format!("{key}={}", self.dir.join(part).display());
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-o", &own("Dir::Etc::sourcelist", "sources.list")])
            .args(["-o", &own("Dir::Etc::sourceparts", "parts")])
            .args(["-o", &own("Dir::State::lists", "lists")])
            .args(["-o", &own("Dir::Cache", "cache")])
            // Descriptions and icons: half of the lists, for nothing.
            .args(["-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"])
            .args(["-o", "Acquire::Languages=none"])
    }

    /// Installs packages on this machine, in their version of `suite`; never removes any.
    pub fn install(&self, suite: &str, packages: &[&str]) -> Result<(), GuestError> {
        let mut command = program::as_root("apt-get");
        self.options(&mut command)
            .args(["install", "-y", "-qq", "--no-install-recommends", "--no-remove", "-t", suite])
            .args(packages);
        program::run(&mut command).map(|_| ())
    }

    /// Packages that one depends on.
    pub fn depends(&self, package: &str) -> Result<Vec<String>, GuestError> {
        let text = program::run(self.options(&mut Command::new("apt-cache")).args(["depends", package]))?;
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    }

    /// Downloads a package's file into a directory.
    pub fn download(&self, package: &str, into: &Path) -> Result<(), GuestError> {
        let mut command = Command::new("apt-get");
        self.options(&mut command).args(["download", "-qq", package]).current_dir(into);
        program::run(&mut command).map(|_| ())
    }
}

/// The name of the machine's Debian release.
pub fn codename() -> Result<String, GuestError> {
    let text = std::fs::read_to_string(OS_RELEASE).map_err(GuestError::io(format!("read {OS_RELEASE}")))?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = name.map(|name| name.trim_matches('"').to_owned());
    name.ok_or_else(|| GuestError::Missing(format!("VERSION_CODENAME in {OS_RELEASE}")))
}

/// The address of the mirror that serves a suite, from sources below `dir` in either of apt's formats.
fn mirror(dir: &Path, suite: &str) -> Result<String, GuestError> {
    let mut files = vec![dir.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(dir.join("sources.list.d")) {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    let found = files.iter().find_map(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        match path.extension()?.to_str()? {
            "list" => from_lines(&text, suite),
            "sources" => from_stanzas(&text, suite),
            _ => None,
        }
    });
    found.ok_or_else(|| GuestError::NoMirror { dir: dir.into(), suite: suite.into() })
}

/// `deb [options] URI SUITE COMPONENT…`
fn from_lines(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (words.next()? == suite && words.any(|component| component == "main")).then(|| uri.to_owned())
    })
}

/// Stanzas of `Key: value…` lines.
fn from_stanzas(text: &str, suite: &str) -> Option<String> {
    text.split("\n\n").find_map(|stanza| {
        let words = |key: &str| {
            let line = stanza.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.unwrap_or("").split_whitespace()
        };
        let has = |key: &str, word: &str| words(key).any(|other| other == word);
        let fits = has("Types", "deb") && has("Suites", suite) && has("Components", "main");
        words("URIs").next().filter(|_| fits).map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_name_the_mirror_of_the_machines_own_release() {
        let lines = "# deb http://no/debian bookworm main\n\
                     deb http://other/tool tool-bookworm main\n\
                     deb [signed-by=/k arch=amd64] http://mirror/debian bookworm main contrib\n";
        assert_eq!(from_lines(lines, "bookworm").as_deref(), Some("http://mirror/debian"));
        assert_eq!(from_lines(lines, "trixie"), None);
        let stanzas = "Types: deb\nURIs: http://security/\nSuites: bookworm-security\nComponents: main\n\n\
                       Types: deb deb-src\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\
                       Components: main\n";
        assert_eq!(from_stanzas(stanzas, "bookworm").as_deref(), Some("http://mirror/debian"));
        assert_eq!(from_stanzas(stanzas, "nodistro"), None);
    }

    #[test]
    fn files_that_are_switched_off_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let parts = dir.path().join("sources.list.d");
        std::fs::create_dir(&parts).unwrap();
        std::fs::write(parts.join("a.list.off"), "deb http://off/ bookworm main\n").unwrap();
        assert!(matches!(mirror(dir.path(), "bookworm"), Err(GuestError::NoMirror { .. })));
        std::fs::write(parts.join("b.list"), "deb http://on/ bookworm main\n").unwrap();
        assert_eq!(mirror(dir.path(), "bookworm").unwrap(), "http://on/");
    }
}
