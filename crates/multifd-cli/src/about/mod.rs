//! What is recorded about a capture behind the machine in its file: when, from where, how.
//!
//! All of it is optional, so that older and later versions of this program read each other's files. It is for people and for
//! their programs; nothing here decides how a file is restored.

pub(crate) mod restore;

use qemu_stream::mapped_ram::StoredMachine;
use serde::{Deserialize, Serialize};

use crate::output::log::time_of_day;

/// What is recorded about a capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(crate) struct About {
    /// The time at which the machine was complete, in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) created: Option<String>,
    /// This program and its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) program: Option<String>,
    /// `capture` or `receive`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) method: Option<String>,
    /// The user's own words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
    /// The address of the source, as it connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
    /// The version of the source's QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) qemu: Option<String>,
    /// The name of the guest (`-name`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) guest_name: Option<String>,
    /// The state of the guest before: `running`: it was captured live; `paused` and others: it was stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) guest_state: Option<String>,
    /// The number of virtual processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) processors: Option<usize>,
    /// How long the guest had been stopped when the file was completed, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stopped_for: Option<u64>,
    /// The command line of the source's QEMU.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) command_line: Vec<String>,
}

impl About {
    /// What is known at the beginning.
    pub(crate) fn new(method: &str, label: Option<&String>) -> Self {
        Self { method: Some(method.into()), label: label.cloned(), ..Self::default() }
    }

    /// What is known of a machine that comes from `peer`.
    pub(crate) fn received(peer: &str, label: Option<&String>) -> Self {
        Self { source: Some(peer.to_owned()), ..Self::new("receive", label) }
    }

    /// The text for the file of a machine that is complete now.
    pub(crate) fn complete(mut self) -> String {
        self.created = Some(time_of_day());
        self.program = Some(concat!("multifd ", env!("CARGO_PKG_VERSION")).into());
        let mut text = self.encode();
        if text.len() > MOST {
            tracing::warn!("the command line of QEMU is too long to be recorded");
            self.command_line.clear();
            text = self.encode();
        }
        text
    }

    /// What people want to see of it, in lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut line = |name: &str, value: String| lines.push(format!("{name:<10} {value}"));
        if let Some(created) = &self.created {
            let method = self.method.iter().map(|method| format!(" by multifd {method}"));
            line("captured", format!("{created}{}", method.collect::<String>()));
        }
        if let Some(label) = &self.label {
            line("label", label.clone());
        }
        let mut guest = Vec::new();
        guest.extend(self.guest_name.iter().map(|name| format!("{name:?}")));
        guest.extend(self.processors.map(|count| format!("{count} processors")));
        guest.extend(self.guest_state.clone());
        guest.extend(self.stopped_for.map(|time| format!("stopped for {time} ms until it was complete")));
        if !guest.is_empty() {
            line("guest", guest.join(", "));
        }
        match (&self.qemu, &self.source) {
            (Some(version), Some(source)) => line("source", format!("QEMU {version} at {source}")),
            (Some(version), None) => line("source", format!("QEMU {version}")),
            (None, Some(source)) => line("source", source.clone()),
            (None, None) => {}
        }
        lines
    }

    /// The text.
    pub(crate) fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| "{}".into())
    }

    /// What the file has; nothing if it has none, or other text.
    pub(crate) fn of(file: &StoredMachine) -> Self {
        Self::read(file.about())
    }

    /// What a text has; nothing if it is another text.
    pub(crate) fn read(text: Option<&str>) -> Self {
        text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
    }
}

/// The greatest length of the text in bytes.
const MOST: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_later_version_is_read_and_other_text_is_not() {
        let about: About = serde_json::from_str(r#"{"label":"é","later":[1]}"#).expect("read");
        assert_eq!(about, About { label: Some("é".into()), ..About::default() });
        assert!(serde_json::from_str::<About>("7").is_err());
    }

    #[test]
    fn command_line_that_is_too_long_is_left_out() {
        let about = About { command_line: vec!["x".repeat(MOST)], ..About::new("capture", None) };
        let text = about.complete();
        let read: About = serde_json::from_str(&text).expect("read");
        assert!(read.command_line.is_empty() && read.created.is_some_and(|time| time.ends_with('Z')));
    }
}
