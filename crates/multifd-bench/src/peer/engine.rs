//! The engine as either end: this program in a separate process, or the program of another build.

use std::{path::Path, process::Command};

use super::{
    Setting,
    child::Talker,
    pair::{Destination, Source},
};
use crate::{
    Result,
    contents::Contents,
    engine::{Go, IntoFile, Loaded, Sent},
};

/// `program` as a source or a destination.
fn role(program: &Path, role: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(role);
    command
}

fn name(contents: Contents) -> Result<String> {
    Ok(serde_json::to_value(contents)?.as_str().unwrap_or_default().to_owned())
}

pub(crate) struct EngineSource<'a> {
    talker: Talker,
    tls: Option<&'a Path>,
    file: Option<IntoFile>,
}

impl<'a> EngineSource<'a> {
    /// The same source, with the address of a file.
    pub(crate) fn into_file(self, into: IntoFile) -> Self {
        Self { file: Some(into), ..self }
    }

    /// Starts a source whose RAM is filled according to `setting`, or which has the machine in a file.
    pub(crate) fn start(
        program: &Path,
        setting: &Setting,
        tls: Option<&'a Path>,
        machine: Option<&Path>,
    ) -> Result<Self> {
        Self::start_as(role(program, "source"), setting, tls, machine)
    }

    /// One that uses sockets alone.
    pub(crate) fn start_raw(program: &Path, setting: &Setting, lent: bool) -> Result<Self> {
        let mut command = role(program, "source");
        command.arg(if lent { "--lent" } else { "--raw" });
        Self::start_as(command, setting, None, None)
    }

    fn start_as(
        mut command: Command,
        setting: &Setting,
        tls: Option<&'a Path>,
        machine: Option<&Path>,
    ) -> Result<Self> {
        match machine {
            Some(file) => command.arg("--machine").arg(file),
            None => command
                .arg(format!("--ram={}", setting.ram))
                .arg(format!("--contents={}", name(setting.contents)?)),
        };
        let mut talker = Talker::start(&mut command)?;
        talker.hear()?;
        Ok(Self { talker, tls, file: None })
    }
}

impl Source for EngineSource<'_> {
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }

    fn done(&mut self) {}

    fn go(&mut self, setting: &Setting, address: &str) -> Result<()> {
        let tls = self.tls.filter(|_| setting.tls).map(|path| path.display().to_string());
        let go = Go {
            address: address.into(),
            channels: setting.channels,
            method: setting.method.into(),
            tls,
            file: self.file,
        };
        self.talker.say(&serde_json::to_string(&go)?)
    }

    fn sent(&mut self) -> Result<(u64, Option<u64>)> {
        let Sent { transferred, beyond } = serde_json::from_str(&self.talker.hear()?)?;
        Ok((transferred, Some(beyond)))
    }

    fn pid(&self) -> u32 {
        self.talker.pid()
    }
}

pub(crate) struct EngineDestination {
    talker: Talker,
    address: String,
}

impl EngineDestination {
    pub(crate) fn start(program: &Path, setting: &Setting, tls: Option<&Path>) -> Result<Self> {
        let mut command = role(program, "destination");
        command.arg(format!("--contents={}", name(setting.contents)?));
        if let Some(tls) = tls.filter(|_| setting.tls) {
            command.arg("--tls").arg(tls);
        }
        Self::start_as(command)
    }

    /// One that uses sockets alone.
    pub(crate) fn start_raw(program: &Path, setting: &Setting) -> Result<Self> {
        let mut command = role(program, "destination");
        command.arg(format!("--contents={}", name(setting.contents)?));
        command.arg(format!("--raw={}", setting.channels)).arg(format!("--ram={}", setting.ram));
        Self::start_as(command)
    }

    /// Starts a destination that loads the machine in a file on the command [go](Self::go).
    pub(crate) fn start_of_file(program: &Path, setting: &Setting, path: &Path) -> Result<Self> {
        let mut command = role(program, "destination");
        command.arg(format!("--contents={}", name(setting.contents)?));
        command.arg(format!("--channels={}", setting.channels)).arg("--file").arg(path);
        Self::start_as(command)
    }

    pub(crate) fn go(&mut self) -> Result<()> {
        self.talker.say("go")
    }

    fn start_as(mut command: Command) -> Result<Self> {
        let mut talker = Talker::start(&mut command)?;
        let address = talker.hear()?;
        Ok(Self { talker, address })
    }
}

impl Destination for EngineDestination {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn loaded(&mut self) -> Result<()> {
        match self.talker.hear()?.as_str() {
            "loaded" => Ok(()),
            line => Err(format!("expected \"loaded\", found {line:?}").into()),
        }
    }

    fn beyond(&mut self) -> Result<Option<u64>> {
        let Loaded { beyond } = serde_json::from_str(&self.talker.hear()?)?;
        Ok(Some(beyond))
    }

    fn pid(&self) -> u32 {
        self.talker.pid()
    }

    fn check(&mut self) -> Result<()> {
        self.talker.say("check")?;
        match self.talker.hear()?.as_str() {
            "right" => Ok(()),
            wrong => Err(wrong.into()),
        }
    }
}
