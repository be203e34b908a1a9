//! The engine as either end: this program in a process of its own.

use std::{path::Path, process::Command};

use super::{
    Setting,
    child::Talker,
    pair::{Destination, Source},
};
use crate::{
    Result,
    contents::Contents,
    engine::{Go, Loaded, Sent},
};

fn this(role: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(role);
    Ok(command)
}

fn name(contents: Contents) -> Result<String> {
    Ok(serde_json::to_value(contents)?.as_str().unwrap_or_default().to_owned())
}

pub(crate) struct EngineSource<'a> {
    talker: Talker,
    tls: Option<&'a Path>,
}

impl<'a> EngineSource<'a> {
    /// One whose RAM is filled as `setting` says, or that is the machine in a file.
    pub(crate) fn start(setting: &Setting, tls: Option<&'a Path>, machine: Option<&Path>) -> Result<Self> {
        let mut command = this("source")?;
        match machine {
            Some(file) => command.arg("--machine").arg(file),
            None => command
                .arg(format!("--ram={}", setting.ram))
                .arg(format!("--contents={}", name(setting.contents)?)),
        };
        let mut talker = Talker::start(&mut command)?;
        talker.hear()?;
        Ok(Self { talker, tls })
    }
}

impl Source for EngineSource<'_> {
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }

    fn done(&mut self) {}

    fn go(&mut self, setting: &Setting, address: &str) -> Result<()> {
        let tls = self.tls.filter(|_| setting.tls).map(|path| path.display().to_string());
        let go =
            Go { address: address.into(), channels: setting.channels, method: setting.method.into(), tls };
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
    pub(crate) fn start(setting: &Setting, tls: Option<&Path>) -> Result<Self> {
        let mut command = this("destination")?;
        command.arg(format!("--contents={}", name(setting.contents)?));
        if let Some(tls) = tls.filter(|_| setting.tls) {
            command.arg("--tls").arg(tls);
        }
        let mut talker = Talker::start(&mut command)?;
        let address = talker.hear()?;
        Ok(Self { talker, address })
    }
}

impl Destination for EngineDestination {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn loaded(&mut self) -> Result<Option<u64>> {
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
