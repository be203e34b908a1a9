//! `cargo xtask dist`: makes what is distributed, below `target/dist`.
//!
//! ```text
//! multifd (static), for each architecture ┐
//! manual pages                            ├─▶ root/usr/… ─┬─▶ multifd_VERSION_ARCH.deb      dpkg-deb
//! completions                             │               └─▶ multifd-VERSION-ARCH.tar.gz   tar
//! licences, docs                          │
//! units of systemd                        ┘                       └── SHA256SUMS            sha256sum
//! ```
//!
//! The program is linked with the C library, so that it runs on every Linux of its architecture. It is made for this machine's
//! architecture; with `--all` also for the other one of x86-64 and aarch64, if what this needs is installed or can be fetched.
//! `--try` tries each package.

mod build;
mod cross;
mod trial;

use std::{
    env::consts::ARCH,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use build::Program;

use crate::{
    Failure,
    step::{cargo, output, run, step},
    workspace_root,
};

/// Makes everything, for `all` architectures or only for this machine's one, and tries it if `tried`.
///
/// # Errors
/// If a part cannot be made, the program is larger than a release may be, or a package fails when it is tried.
pub(crate) fn run_task(all: bool, tried: bool) -> Result<(), Failure> {
    let made = make(all)?;
    if tried {
        for made in &made {
            trial::run(made)?;
        }
    }
    Ok(())
}

/// What was made for one architecture.
struct Made {
    arch: &'static str,
    /// Below it are all files.
    folder: PathBuf,
    archive: PathBuf,
    /// `None` if this machine has no dpkg-deb.
    package: Option<PathBuf>,
}

/// Makes everything: the parts that all architectures have in common, then each program and its packages.
fn make(all: bool) -> Result<Vec<Made>, Failure> {
    let folder = workspace_root().join("target/dist");
    let root = folder.join("root");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let programs = step("compilers", || programs(all))?;
    step("manual", || manual(&root))?;
    step("documents", || documents(&root))?;
    step("units", || units(&root))?;
    let mut made = Vec::new();
    let mut sizes = Vec::new();
    for program in programs {
        let arch = program.arch;
        sizes.push(step(&format!("program for {arch}"), || program.build(&root.join("usr/bin/multifd")))?);
        made.push(step(&format!("packages for {arch}"), || pack(&folder, &root, arch))?);
    }
    step("checksums", || {
        let files = made.iter().flat_map(|made| [Some(&made.archive), made.package.as_ref()]).flatten();
        let names = files.filter_map(|file| file.file_name());
        let sums = output(Command::new("sha256sum").current_dir(&folder).args(names))?;
        Ok(fs::write(folder.join("SHA256SUMS"), sums)?)
    })?;
    for (made, size) in made.iter().zip(sizes) {
        println!("program for {}: {size} bytes", made.arch);
        for file in [Some(&made.archive), made.package.as_ref()].into_iter().flatten() {
            println!("{}", file.display());
        }
    }
    Ok(made)
}

/// The programs that can be built here, this machine's one last: it is the one that remains in the folder.
fn programs(all: bool) -> Result<Vec<Program>, Failure> {
    let mut programs = Vec::new();
    for arch in ["x86_64", "aarch64"] {
        if all && arch != ARCH {
            match Program::musl(arch) {
                Ok(program) => programs.push(program),
                Err(missing) => eprintln!("   SKIPPED: NO PROGRAM FOR {arch}: {missing}"),
            }
        }
    }
    programs.push(Program::native()?);
    Ok(programs)
}

/// Makes the archive and the Debian package of what is in `root`.
fn pack(folder: &Path, root: &Path, arch: &'static str) -> Result<Made, Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let archive = folder.join(format!("multifd-{version}-{arch}.tar.gz"));
    run(Command::new("tar")
        .current_dir(root)
        .args(["--owner=0", "--group=0", "--sort=name", "-czf"])
        .arg(&archive)
        .arg("usr"))?;
    let package = package(folder, root, version, arch)?;
    Ok(Made { arch, folder: folder.to_owned(), archive, package })
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
fn package(folder: &Path, root: &Path, version: &str, arch: &str) -> Result<Option<PathBuf>, Failure> {
    if Command::new("dpkg-deb").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("   SKIPPED: no dpkg-deb on this machine");
        return Ok(None);
    }
    let own;
    let arch = match cross::debian(arch) {
        Ok(name) => name,
        Err(_) => {
            own = output(Command::new("dpkg").arg("--print-architecture"))?;
            own.trim()
        }
    };
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

fn copy(from: &Path, to: &Path, mode: u32) -> Result<(), Failure> {
    fs::create_dir_all(to.parent().unwrap_or(Path::new(".")))?;
    fs::copy(from, to).map_err(|error| format!("{}: {error}", from.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

const COPYRIGHT: &str =
    "multifd is licensed under Apache-2.0 or BSD-3-Clause, at your choice. Both texts are in this folder.\n";
