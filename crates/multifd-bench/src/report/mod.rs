//! Reports the results: a table for people, all samples for programs, a picture.

mod json;
mod picture;
mod table;

use std::{fs, path::Path};

pub(crate) use table::markdown;

use crate::{Result, measure::Measured};

/// Writes `results.md`, `results.json` and, if there is something to draw, `channels.svg`.
pub(crate) fn write(folder: &Path, all: &[Measured], rounds: usize) -> Result<()> {
    fs::write(folder.join("results.md"), markdown(all, rounds))?;
    fs::write(folder.join("results.json"), serde_json::to_string_pretty(&json::of(all))?)?;
    if let Some(picture) = picture::draw(all)? {
        fs::write(folder.join("channels.svg"), picture)?;
    }
    Ok(())
}
