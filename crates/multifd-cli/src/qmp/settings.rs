//! Capabilities and parameters of migration: as they were, as they are wanted, and put back.

use std::collections::BTreeMap;

use multifd::Method;
use serde_json::{Map, Value, json};

use super::connection::{Qmp, QmpError};

/// The settings of a QEMU.
#[derive(Debug)]
pub(crate) struct Settings {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
}

/// The settings that a migration needs.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) capabilities: Vec<(&'static str, bool)>,
    pub(crate) parameters: Vec<(&'static str, Value)>,
}

impl Wanted {
    /// Wants a capability that no other migration of this program has on.
    pub(crate) fn with_postcopy(mut self) -> Self {
        self.capabilities.retain(|(name, _)| *name != POSTCOPY);
        self.capabilities.push((POSTCOPY, true));
        // The guest is stopped then.
        self.parameters.push(("max-postcopy-bandwidth", json!(0)));
        self
    }

    /// The settings of a migration over `channels`, or over main alone without any.
    pub(crate) fn over(channels: u8, method: Method, return_path: bool) -> Self {
        let mut capabilities: Vec<_> = OFF.map(|name| (name, false)).into();
        capabilities.extend([("multifd", channels > 0), ("return-path", return_path)]);
        let mut parameters = vec![("tls-creds", json!(""))];
        if channels > 0 {
            parameters.push(("multifd-channels", json!(channels)));
            parameters.push(("multifd-compression", json!(method.as_str())));
        }
        Self { capabilities, parameters }
    }
}

impl Wanted {
    /// The settings of a destination whose guest runs before its RAM is there.
    pub(crate) fn postcopy(preempt: bool) -> Self {
        let mut wanted = Self::over(0, Method::None, true);
        let on = [("postcopy-ram", true), ("postcopy-preempt", preempt)];
        wanted.capabilities.retain(|(name, _)| on.iter().all(|(other, _)| name != other));
        wanted.capabilities.extend(on);
        wanted
    }
}

/// What a change has replaced. Put it back when the migration has ended.
#[derive(Debug, Default)]
#[must_use = "the QEMU keeps the settings of this migration"]
pub(crate) struct Changed {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Asks a QEMU for its settings.
    pub(crate) fn of(qmp: &mut Qmp) -> Result<Self, QmpError> {
        const COMMAND: &str = "query-migrate-capabilities";
        let incomplete = || QmpError::Incomplete { command: COMMAND, lacks: "list of capabilities" };
        let listed = qmp.execute(COMMAND, json!({}))?;
        let known = |entry: &Value| {
            Some((entry.get("capability")?.as_str()?.to_owned(), entry.get("state")?.as_bool()?))
        };
        let capabilities = listed.as_array().ok_or_else(incomplete)?.iter().filter_map(known).collect();
        let parameters = qmp.query_all("query-migrate-parameters")?;
        Ok(Self { capabilities, parameters })
    }

    /// Whether a capability is on; `None` if this QEMU does not have it.
    pub(crate) fn capability(&self, name: &str) -> Option<bool> {
        self.capabilities.get(name).copied()
    }

    /// Makes the settings as wanted, where they differ. A capability or parameter that this QEMU does not know is left out
    /// if it is wanted off, which it is; else QEMU's refusal is returned, and everything is as before.
    pub(crate) fn change(&self, qmp: &mut Qmp, wanted: &Wanted) -> Result<Changed, QmpError> {
        let mut changed = Changed::default();
        let (mut capabilities, mut parameters) = (Vec::new(), Map::new());
        for &(name, state) in &wanted.capabilities {
            match self.capabilities.get(name) {
                Some(before) if *before == state => {}
                None if !state => {}
                before => {
                    capabilities.push((name.to_owned(), state));
                    changed.capabilities.extend(before.map(|before| (name.to_owned(), *before)));
                }
            }
        }
        for (name, value) in &wanted.parameters {
            let before = self.parameters.get(*name);
            if before != Some(value) && !(before.is_none() && is_off(value)) {
                parameters.insert((*name).to_owned(), value.clone());
                changed.parameters.extend(before.map(|before| ((*name).to_owned(), before.clone())));
            }
        }
        set_capabilities(qmp, &capabilities)?;
        if let Err(error) = set_parameters(qmp, parameters) {
            set_capabilities(qmp, &changed.capabilities)?;
            return Err(error);
        }
        Ok(changed)
    }

    /// Puts these parameters back with `changed`, because they may be changed while the migration runs.
    pub(crate) fn put_back_also(&self, changed: &mut Changed, names: &[&str]) {
        let before =
            names.iter().filter_map(|name| Some(((*name).to_owned(), self.parameters.get(*name)?.clone())));
        changed.parameters.extend(before);
    }
}

impl Changed {
    /// Puts the settings back. Both parts are tried, and the first error is returned.
    pub(crate) fn put_back(self, qmp: &mut Qmp) -> Result<(), QmpError> {
        let parameters = set_parameters(qmp, self.parameters);
        set_capabilities(qmp, &self.capabilities).and(parameters)
    }
}

fn set_capabilities(qmp: &mut Qmp, states: &[(String, bool)]) -> Result<(), QmpError> {
    if states.is_empty() {
        return Ok(());
    }
    let all: Vec<_> =
        states.iter().map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": all })).map(drop)
}

fn set_parameters(qmp: &mut Qmp, values: Map<String, Value>) -> Result<(), QmpError> {
    if values.is_empty() {
        return Ok(());
    }
    qmp.execute("migrate-set-parameters", Value::Object(values)).map(drop)
}

/// A value that an older QEMU has without a parameter of this name.
fn is_off(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | ""))
}

const POSTCOPY: &str = "postcopy-ram";

/// Capabilities that change what a source sends in a way that a file cannot keep, or that concern another transport.
const OFF: [&str; 16] = [
    "xbzrle",
    "compress",
    "rdma-pin-all",
    "zero-blocks",
    "block",
    POSTCOPY,
    "postcopy-preempt",
    "x-colo",
    "release-ram",
    "pause-before-switchover",
    "dirty-bitmaps",
    "x-ignore-shared",
    "background-snapshot",
    "zero-copy-send",
    "switchover-ack",
    "mapped-ram",
];
