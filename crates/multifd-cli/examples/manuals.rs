//! Writes the manual pages and the completions of the program below a folder, as a distribution installs them:
//! `cargo run -p multifd-cli --example manuals -- FOLDER`.

use std::{env, fs, io, path::PathBuf};

use clap_complete::{Shell, generate_to};

fn main() -> io::Result<()> {
    let folder = env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| io::Error::other("expected a folder"))?;
    let manuals = folder.join("man/man1");
    fs::create_dir_all(&manuals)?;
    clap_mangen::generate_to(multifd_cli::command(), &manuals)?;
    for (shell, place) in [
        (Shell::Bash, "bash-completion/completions"),
        (Shell::Zsh, "zsh/vendor-completions"),
        (Shell::Fish, "fish/vendor_completions.d"),
    ] {
        let place = folder.join(place);
        fs::create_dir_all(&place)?;
        let written = generate_to(shell, &mut multifd_cli::command(), "multifd", &place)?;
        // The shell finds the completions by the name of the command alone.
        if shell == Shell::Bash {
            fs::rename(written, place.join("multifd"))?;
        }
    }
    Ok(())
}
