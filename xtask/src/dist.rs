//! `cargo xtask dist`: makes what is distributed, below `target/dist`.
//!
//! ```text
//! multifd (static) ┐
//! manual pages     ├─▶ root/usr/… ─┬─▶ multifd_VERSION_ARCH.deb      dpkg-deb
//! completions      │               └─▶ multifd-VERSION-ARCH.tar.gz   tar
//! licences, docs   │
//! units of systemd ┘                       └── SHA256SUMS            sha256sum
//! ```
//!
//! The program is linked with the C library, so that it runs on every Linux of its architecture. `--try` unpacks the package
//! with dpkg into an empty folder, and uses and removes it there; nothing else is in that folder.

use std::{
    env::consts::ARCH,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    Failure,
    step::{cargo, output, run, step},
    workspace_root,
};

/// Makes everything.
///
/// # Errors
/// As [`try_out`].
pub(crate) fn run_task() -> Result<(), Failure> {
    make().map(drop)
}

/// What was made.
struct Made {
    folder: PathBuf,
    /// `None` if this machine has no dpkg-deb.
    package: Option<PathBuf>,
}

/// Makes everything.
///
/// # Errors
/// If a part cannot be made, or the program is larger than a release may be.
fn make() -> Result<Made, Failure> {
    let folder = workspace_root().join("target/dist");
    let root = folder.join("root");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let program = step("program", || program(&root))?;
    step("manual", || manual(&root))?;
    step("documents", || documents(&root))?;
    step("units", || units(&root))?;
    let version = env!("CARGO_PKG_VERSION");
    let archive = format!("multifd-{version}-{ARCH}.tar.gz");
    step("archive", || {
        run(Command::new("tar")
            .current_dir(&root)
            .args(["--owner=0", "--group=0", "--sort=name", "-czf"])
            .arg(folder.join(&archive))
            .arg("usr"))
    })?;
    let package = step("package", || package(&folder, &root, version))?;
    let name =
        package.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
    step("checksums", || {
        let sums =
            output(Command::new("sha256sum").current_dir(&folder).arg(&archive).args(name.as_deref()))?;
        Ok(fs::write(folder.join("SHA256SUMS"), sums)?)
    })?;
    println!("{}: {} bytes", program.display(), fs::metadata(&program)?.len());
    println!("{}", folder.join(archive).display());
    if let Some(package) = &package {
        println!("{}", package.display());
    }
    Ok(Made { folder, package })
}

/// Builds the program, linked statically and without debug information.
fn program(root: &Path) -> Result<PathBuf, Failure> {
    let target = host()?;
    let commit =
        output(Command::new("git").current_dir(workspace_root()).args(["rev-parse", "--short=12", "HEAD"]));
    run(cargo()
        .args(["build", "--quiet", "--locked", "--profile", "dist", "-p", "multifd-cli", "--bin", "multifd"])
        .args(["--target", &target])
        // Relocations in their short form are 300 KB less.
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs")
        .env("MULTIFD_COMMIT", commit.as_deref().map_or("unknown", str::trim)))?;
    let built = workspace_root().join("target").join(&target).join("dist/multifd");
    let program = root.join("usr/bin/multifd");
    copy(&built, &program, 0o755)?;
    let size = fs::metadata(&program)?.len();
    if size > LARGEST {
        return Err(format!("the program has {size} bytes, expected at most {LARGEST}").into());
    }
    let needed = output(Command::new("readelf").arg("-d").arg(&program));
    if needed.is_ok_and(|dynamic| dynamic.contains("(NEEDED)")) {
        return Err("the program needs shared libraries".into());
    }
    Ok(program)
}

/// The target triple of this machine.
fn host() -> Result<String, Failure> {
    let told = output(Command::new("rustc").arg("-vV"))?;
    let host = told.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.ok_or("rustc -vV has no host")?.to_owned())
}

fn manual(root: &Path) -> Result<(), Failure> {
    let share = root.join("usr/share");
    run(cargo()
        .args(["run", "--quiet", "--locked", "-p", "multifd-cli", "--example", "manuals", "--"])
        .arg(&share))?;
    for page in fs::read_dir(share.join("man/man1"))? {
        run(Command::new("gzip").args(["-9", "-n"]).arg(page?.path()))?;
    }
    Ok(())
}

fn documents(root: &Path) -> Result<(), Failure> {
    let docs = root.join("usr/share/doc/multifd");
    for name in ["README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE-APACHE", "LICENSE-BSD-3-Clause"] {
        copy(&workspace_root().join(name), &docs.join(name), 0o644)?;
    }
    for page in fs::read_dir(workspace_root().join("docs/use"))? {
        let page = page?;
        copy(&page.path(), &docs.join("use").join(page.file_name()), 0o644)?;
    }
    fs::write(docs.join("copyright"), COPYRIGHT)?;
    Ok(())
}

/// The units of systemd. Nothing is enabled by the package.
fn units(root: &Path) -> Result<(), Failure> {
    for unit in fs::read_dir(workspace_root().join("systemd"))? {
        let unit = unit?;
        copy(&unit.path(), &root.join("usr/lib/systemd/system").join(unit.file_name()), 0o644)?;
    }
    Ok(())
}

/// Makes the Debian package.
fn package(folder: &Path, root: &Path, version: &str) -> Result<Option<PathBuf>, Failure> {
    if Command::new("dpkg-deb").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("   SKIPPED: no dpkg-deb on this machine");
        return Ok(None);
    }
    let arch = output(Command::new("dpkg").arg("--print-architecture"))?;
    let arch = arch.trim();
    let control = root.join("DEBIAN/control");
    fs::create_dir_all(root.join("DEBIAN"))?;
    let text = format!(
        "Package: multifd\nVersion: {version}\nArchitecture: {arch}\nMaintainer: the multifd developers <multifd@localhost>\n\
         Section: admin\nPriority: optional\nDescription: captures and restores running QEMU guests\n\
         \u{20}multifd speaks QEMU's live-migration protocol over many connections at once.\n\
         \u{20}It keeps a running guest in a file and restores it into a QEMU.\n"
    );
    fs::write(&control, text)?;
    let package = folder.join(format!("multifd_{version}_{arch}.deb"));
    run(Command::new("dpkg-deb")
        .args(["--root-owner-group", "--build"])
        .arg(root)
        .arg(&package)
        .stdout(Stdio::null()))?;
    fs::remove_dir_all(root.join("DEBIAN"))?;
    Ok(Some(package))
}

/// Makes everything, and installs, uses and removes the package in an empty folder.
///
/// # Errors
/// If a step fails, or something is left.
pub(crate) fn try_out() -> Result<(), Failure> {
    let made = make()?;
    let Some(package) = &made.package else {
        return Err("the package cannot be tried: dpkg-deb is missing".into());
    };
    let clean = made.folder.join("clean");
    let dpkg = |args: &[&str]| {
        let mut command = Command::new("dpkg");
        // Nothing of this machine is used: no database, no scripts, no configuration.
        command
            .arg(format!("--root={}", clean.display()))
            .args(["--force-not-root", "--force-bad-path"])
            .args(args);
        command
    };
    step("install", || {
        fs::create_dir_all(clean.join("var/lib/dpkg/updates"))?;
        fs::create_dir_all(clean.join("var/lib/dpkg/info"))?;
        fs::write(clean.join("var/lib/dpkg/status"), "")?;
        output(dpkg(&["--install"]).arg(package)).map(drop)
    })?;
    step("use", || {
        for folder in ["proc", "dev", "tmp"] {
            fs::create_dir_all(clean.join(folder))?;
        }
        let inside = |command: &str| {
            let script = format!(
                "mount -t proc proc {0}/proc && mount --rbind /dev {0}/dev && exec chroot {0} {command}",
                clean.display()
            );
            // In namespaces of its own, so that no mount is left; as root of its own if this is not root.
            output(Command::new("unshare").args([
                "--map-root-user",
                "--mount",
                "--pid",
                "--fork",
                "sh",
                "-c",
                &script,
            ]))
        };
        let told = inside("/usr/bin/multifd --version -v")?;
        print!("{told}");
        if !told.contains("commit") {
            return Err("the program does not report its commit".into());
        }
        let told = inside("/usr/bin/multifd demo --size 64M")?;
        if !told.contains("RAM is equal") {
            return Err(format!("the demo found a difference: {told}").into());
        }
        for file in [
            "share/man/man1/multifd-capture.1.gz",
            "share/bash-completion/completions/multifd",
            "lib/systemd/system/multifd-receive@.socket",
        ] {
            fs::metadata(clean.join("usr").join(file)).map_err(|error| format!("{file}: {error}"))?;
        }
        Ok(())
    })?;
    step("remove", || {
        output(&mut dpkg(&["--purge", "multifd"]))?;
        match clean.join("usr/bin/multifd").exists() || clean.join("usr/share/doc/multifd").exists() {
            true => Err("the package has left files".into()),
            false => Ok(fs::remove_dir_all(&clean)?),
        }
    })
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<(), Failure> {
    fs::create_dir_all(to.parent().unwrap_or(Path::new(".")))?;
    fs::copy(from, to).map_err(|error| format!("{}: {error}", from.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

/// The most bytes that a program without debug information may have.
const LARGEST: u64 = 8_000_000;
const COPYRIGHT: &str =
    "multifd is licensed under Apache-2.0 or BSD-3-Clause, at your choice. Both texts are in this folder.\n";
