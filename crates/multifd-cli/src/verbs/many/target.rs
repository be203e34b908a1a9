//! The file of one machine of `receive --dir`. Its name contains the UUID, which comes with the channels: so the complete file
//! has a hidden name of its own, and gets the final one before the source is informed.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process,
    sync::{Mutex, PoisonError},
};

use multifd::wire::VmUuid;
use tempfile::TempPath;

use crate::{
    file_name::{Known, NameTemplate, numbered},
    output::{outcome::While, outlet::shown},
};

/// The file of one machine.
pub(super) struct Target<'a> {
    folder: &'a Path,
    template: &'a NameTemplate,
    known: Known,
    hidden: PathBuf,
    named: Mutex<Option<PathBuf>>,
}

impl<'a> Target<'a> {
    /// The file of machine `number`, which arrives now.
    pub(super) fn new(folder: &'a Path, template: &'a NameTemplate, number: u64) -> Self {
        let hidden = folder.join(format!(".machine-{number}-of-{}", process::id()));
        Self { folder, template, known: Known::now(number), hidden, named: Mutex::new(None) }
    }

    /// The path of the file until it is complete.
    pub(super) fn hidden(&self) -> &Path {
        &self.hidden
    }

    /// The path of the file, if it has its name.
    pub(super) fn named(&self) -> Option<PathBuf> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives the complete file its name, which no other file has. If that fails, the file is removed.
    ///
    /// # Errors
    /// If the name is not usable, or the system refuses it.
    pub(super) fn name(&self, uuid: Option<VmUuid>) -> Result<(), While> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            While::new(format!("cannot name a file in {}", shown(self.folder)), error)
        };
        // Removes the file if it is dropped.
        let mut file = TempPath::try_from_path(&self.hidden).map_err(|error| failed(error.into()))?;
        let name =
            self.template.name(&Known { uuid, ..self.known.clone() }).map_err(|why| failed(why.into()))?;
        for number in 1..=MOST {
            let name = if number == 1 { name.clone() } else { numbered(&name, number) };
            let path = self.folder.join(name);
            match file.persist_noclobber(&path) {
                Ok(()) => {
                    // A file system without sync of folders reports that, and is as good as it can be.
                    let _ = File::open(self.folder).and_then(|folder| folder.sync_all());
                    *self.named.lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
                    return Ok(());
                }
                Err(taken) if taken.error.kind() == io::ErrorKind::AlreadyExists => file = taken.path,
                Err(refused) => return Err(failed(refused.error.into())),
            }
        }
        Err(failed(format!("{name} and {MOST} names like it are in use: use {{time}} or {{number}}").into()))
    }
}

/// The number of names that are tried.
const MOST: u32 = 999;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn name_in_use_gets_a_number_and_no_file_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let template = NameTemplate::parse("vm.ram").expect("a template");
        for (number, name) in [(1, "vm.ram"), (2, "vm-2.ram"), (3, "vm-3.ram")] {
            let target = Target::new(folder.path(), &template, number);
            fs::write(target.hidden(), number.to_string()).expect("written");
            target.name(None).expect("named");
            assert_eq!(target.named(), Some(folder.path().join(name)));
            assert_eq!(fs::read_to_string(folder.path().join(name)).expect("read"), number.to_string());
            assert!(!target.hidden().exists());
        }
    }

    #[test]
    fn file_that_cannot_be_named_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let template = NameTemplate::parse("vm.ram").expect("a template");
        fs::write(folder.path().join("vm.ram"), "precious").expect("written");
        for number in 2..=MOST {
            fs::write(folder.path().join(numbered("vm.ram", number)), "").expect("written");
        }
        let target = Target::new(folder.path(), &template, 1);
        fs::write(target.hidden(), "new").expect("written");
        let refused = target.name(None).expect_err("all names are in use");
        assert!(
            std::error::Error::source(&refused).expect("why").to_string().contains("in use"),
            "{refused}"
        );
        assert!(!target.hidden().exists() && target.named().is_none());
        assert_eq!(fs::read_to_string(folder.path().join("vm.ram")).expect("read"), "precious");
    }
}
