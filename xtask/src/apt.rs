//! Installs Debian packages without root and without touching the system's package state.
//!
//! ```text
//! apt-get indextargets ──► mirror ──► private sources.list, lists, cache, empty dpkg status
//!                                        │
//!          the packages asked for and all they depend on ──► .deb files ──► dpkg-deb -x ──► a folder
//! ```
//!
//! apt's own client resolves, downloads and checks signatures as always; only the paths to which it writes are ours.
//! Possible errors: no apt here, no Debian mirror among its sources, no network, a suite that is no longer on the
//! mirror. The caller decides what to do without the packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Failure;
use crate::step::{output, run};

/// A private apt in its own folder.
pub(crate) struct Apt {
    home: PathBuf,
}

/// A package file on disk.
pub(crate) struct Package {
    /// The file's name, which contains the package's name and version.
    pub(crate) name: String,
    path: PathBuf,
}

impl Apt {
    /// Sets up a private apt in `home` for `suites` of the mirror that the system's apt uses, and updates its lists. It
    /// knows the packages of this machine's architecture and those of the Debian architecture `foreign`.
    ///
    /// # Errors
    ///
    /// When there is no apt, it knows no Debian mirror, or the lists cannot be downloaded.
    pub(crate) fn new(home: &Path, suites: &[&str], foreign: Option<&str>) -> Result<Self, Failure> {
        for folder in ["state/lists/partial", "cache/archives/partial", "etc"] {
            fs::create_dir_all(home.join(folder))?;
        }
        // With an empty status file nothing counts as installed, so all dependencies are downloaded, libc included.
        fs::write(home.join("state/status"), "")?;
        let mirror = mirror()?;
        let signed_by =
            if Path::new(KEYRING).exists() { format!(" [signed-by={KEYRING}]") } else { String::new() };
        let sources: String =
            suites.iter().map(|suite| format!("deb{signed_by} {mirror} {suite} main\n")).collect();
        fs::write(home.join("etc/sources.list"), sources)?;
        fs::write(home.join("etc/apt.conf"), configuration(home, foreign)?)?;
        let apt = Self { home: home.to_owned() };
        run(apt.get().arg("-qq").arg("update").stdout(Stdio::null()))?;
        Ok(apt)
    }

    /// Downloads `packages` of `suite` and everything they depend on.
    ///
    /// # Errors
    ///
    /// When a package is not in the suite, or a download fails.
    pub(crate) fn download(&self, suite: &str, packages: &[&str]) -> Result<Vec<Package>, Failure> {
        let install = |flag: &str| {
            let mut get = self.get();
            get.args(["-qq", "--yes", "--no-install-recommends", flag, "-t", suite, "install"])
                .args(packages);
            get
        };
        self.fetch(&install)
    }

    /// Downloads `packages` of `suite` alone, without what they depend on: headers and libraries that only a compiler reads.
    ///
    /// # Errors
    ///
    /// As [`Self::download`].
    pub(crate) fn download_alone(&self, suite: &str, packages: &[&str]) -> Result<Vec<Package>, Failure> {
        let download = |flag: &str| {
            let mut get = self.get();
            get.current_dir(self.home.join("cache/archives"));
            get.args(["-qq", flag, "download"])
                .args(packages.iter().map(|package| format!("{package}/{suite}")));
            get
        };
        self.fetch(&download)
    }

    /// Downloads the files that the command `with` lists with `--print-uris` and downloads with [`DOWNLOAD`].
    fn fetch(&self, with: &dyn Fn(&str) -> Command) -> Result<Vec<Package>, Failure> {
        // Only files that are not in the cache yet have a URI, so the list comes before the download and the cache is
        // emptied first.
        run(self.get().arg("clean"))?;
        let listing = output(&mut with("--print-uris"))?;
        let names: Vec<&str> = listing
            .lines()
            .filter(|line| line.starts_with('\''))
            .filter_map(|line| line.split_ascii_whitespace().nth(1))
            .collect();
        if names.is_empty() {
            return Err(format!("apt-get lists no file to download:\n{listing}").into());
        }
        run(with(DOWNLOAD).stdout(Stdio::null()))?;
        let archives = self.home.join("cache/archives");
        names
            .into_iter()
            .map(|name| {
                let path = archives.join(name);
                if !path.is_file() {
                    return Err(
                        format!("apt-get reports success, but {} does not exist", path.display()).into()
                    );
                }
                Ok(Package { name: name.to_owned(), path })
            })
            .collect()
    }

    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.arg("-c").arg(self.home.join("etc/apt.conf")).stdin(Stdio::null());
        command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

impl Package {
    /// Unpacks the package's files under `root`.
    ///
    /// # Errors
    ///
    /// When there is no `dpkg-deb`, or the file is damaged.
    pub(crate) fn unpack(&self, root: &Path) -> Result<(), Failure> {
        run(Command::new("dpkg-deb").arg("--extract").arg(&self.path).arg(root))
    }

    /// The command that writes the package's files as a tar archive to its standard output.
    pub(crate) fn contents(&self) -> Command {
        let mut command = Command::new("dpkg-deb");
        command.arg("--fsys-tarfile").arg(&self.path).stdin(Stdio::null());
        command
    }

    /// The first package that it depends on.
    ///
    /// # Errors
    ///
    /// When there is no `dpkg-deb`, or it depends on nothing.
    pub(crate) fn depends_on(&self) -> Result<String, Failure> {
        let mut field = Command::new("dpkg-deb");
        let listing = output(field.arg("--field").arg(&self.path).arg("Depends"))?;
        let first = listing.split([' ', ',', '|', '\n']).next().filter(|name| !name.is_empty());
        Ok(first.ok_or_else(|| format!("{} depends on nothing", self.name))?.to_owned())
    }
}

/// The mirror from which the system's apt downloads Debian.
fn mirror() -> Result<String, Failure> {
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", "$(TARGET_OF)|$(LABEL)|$(CREATED_BY)|$(REPO_URI)"]);
    let listing = output(&mut targets)?;
    pick_mirror(&listing).map(str::to_owned).ok_or_else(|| {
        "no source labelled \"Debian\" in `apt-get indextargets`: not a Debian system, or no lists".into()
    })
}

/// The first package index labelled Debian. Sources whose lists were never downloaded have no label, so the next choice
/// is one whose path ends in `/debian`.
fn pick_mirror(listing: &str) -> Option<&str> {
    let sources = || {
        listing.lines().filter_map(|line| {
            let mut fields = line.splitn(4, '|');
            let (of, label, by, uri) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            (of == "deb" && by == "Packages" && !uri.is_empty()).then_some((label, uri))
        })
    };
    let labelled = sources().find(|(label, _)| *label == "Debian");
    let by_path = || sources().find(|(_, uri)| uri.trim_end_matches('/').ends_with("/debian"));
    labelled.or_else(by_path).map(|(_, uri)| uri)
}

/// Our configuration, read after the system's: it keeps proxies and replaces paths and hooks.
fn configuration(home: &Path, foreign: Option<&str>) -> Result<String, Failure> {
    let home = home.to_str().ok_or_else(|| format!("path {} is not UTF-8", home.display()))?;
    if home.contains('"') {
        return Err(format!("path {home} holds a quote, which apt's configuration cannot").into());
    }
    let mut architectures = String::new();
    if let Some(foreign) = foreign {
        let own = output(Command::new("dpkg").arg("--print-architecture"))?;
        architectures = format!("APT::Architectures {{ \"{}\"; \"{foreign}\"; }};\n", own.trim());
    }
    Ok(format!(
        r#"{architectures}Dir::State "{home}/state";
Dir::State::lists "lists/";
Dir::State::status "{home}/state/status";
Dir::Cache "{home}/cache";
Dir::Cache::archives "archives/";
Dir::Etc::sourcelist "{home}/etc/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "{home}/state";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb-src;
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
APT::Sandbox::User "root";
APT::Get::Assume-Yes "true";
"#
    ))
}

const DOWNLOAD: &str = "--download-only";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_is_the_one_labelled_debian() {
        let listing = "deb|Other|Packages|http://a/x/\ndeb-src|Debian|Sources|http://b/y/\n\
                       deb|Debian-Security|Packages|http://c/debian-security/\ndeb|Debian|Packages|http://d/z/\n";
        assert_eq!(pick_mirror(listing), Some("http://d/z/"));
    }

    #[test]
    fn mirror_without_lists_is_told_by_its_path() {
        let listing = "deb||Packages|http://a/debian-security/\ndeb||Packages|http://b/debian/\n";
        assert_eq!(pick_mirror(listing), Some("http://b/debian/"));
    }

    #[test]
    fn foreign_sources_give_no_mirror() {
        assert_eq!(pick_mirror("deb|Ubuntu|Packages|http://a/ubuntu/\n"), None);
    }
}
