//! The interface to the guest whose RAM moves.

use std::collections::{HashMap, HashSet};

use super::DeviceName;
use crate::{
    error::{Result, Usage},
    outcome::Percent,
};

/// Whether a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Its processors run, or would run if a migration had not stopped them.
    Running,
    /// Its operator has paused it. It stays paused wherever it goes.
    Paused,
}

impl RunState {
    /// QEMU's name for it: `running`, `paused`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The state of one device, as bytes that only that device understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// The device's name.
    pub name: DeviceName,
    /// The number that distinguishes devices with this name.
    pub instance_id: u32,
    /// The version of the state's layout.
    pub version: u32,
    /// The state.
    pub data: Vec<u8>,
}

/// A device whose state a guest will give: the properties that can be checked while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As in its [section](DeviceSection::name).
    pub name: DeviceName,
    /// As in its [section](DeviceSection::instance_id).
    pub instance_id: u32,
    /// The greatest size of its state in bytes. All devices together may have 128 MiB in the format of QEMU. A state that
    /// turns out to be larger than announced fails the migration after the guest was stopped; the guest stays here.
    pub most_bytes: u64,
}

impl DeviceInfo {
    /// Creates the only device of this name.
    pub fn new(name: DeviceName, most_bytes: u64) -> Self {
        Self { name, instance_id: 0, most_bytes }
    }

    /// Sets the instance, for one of several devices of this name.
    #[must_use]
    pub fn instance(mut self, instance_id: u32) -> Self {
        self.instance_id = instance_id;
        self
    }
}

/// The guest whose RAM moves.
///
/// A panic in one of these calls ends the migration like an error.
pub trait Guest {
    /// The devices that [`save`](Guest::save) will give, each with the greatest size of its state. Called before
    /// anything is sent, with the guest running. Refused then: two devices with the same name and instance, more than
    /// 65,535 devices, and more state than a destination accepts. In the format of QEMU (the crate `qemu-stream`) that is
    /// 128 MiB for all devices together, and the name `globalstate` is that of the guest's run state.
    fn devices(&self) -> Vec<DeviceInfo>;

    /// Whether the guest runs or is paused. Called right before [`stop`](Guest::stop), on the same thread. The result
    /// is the state of the guest at the destination, or here again if the migration fails.
    ///
    /// **Warning:** a pause from another thread after that, while the guest is stopped for the migration, is not
    /// noticed here. Refuse it, or make [`resume`](Guest::resume) respect it. Otherwise the guest runs although its
    /// operator has paused it.
    fn run_state(&mut self) -> RunState;

    /// Stops the guest. A guest that is [paused](RunState::Paused) already stays so. After the return nothing may write
    /// to RAM: no processor, no device, no pending request. A write after that fails the migration, if the dirty log
    /// contains it.
    ///
    /// # Errors
    /// If it cannot be stopped. It must then be as it was before; [`resume`](Guest::resume) is not called, and the
    /// migration fails.
    fn stop(&mut self) -> std::io::Result<()>;

    /// Returns the state of the stopped guest's devices. With
    /// [`pause_before_switchover`](super::MigrateOptions::pause_before_switchover) it is called after the pause, so
    /// what is drained in the pause is included in the devices and in RAM. It may write to RAM.
    ///
    /// # Errors
    /// If a state is not available; the migration then fails and the guest continues.
    fn save(&mut self) -> std::io::Result<Vec<DeviceSection>>;

    /// Resumes the guest: the migration has failed or was cancelled, and the guest [ran](Guest::run_state) before it
    /// was stopped. Also called after [`stop`](Guest::stop) has panicked at any point: the guest may still run.
    fn resume(&mut self);

    /// Whether [`throttle`](Guest::throttle) is implemented. If not, a migration with
    /// [`auto_converge`](super::MigrateOptions::auto_converge) is refused before it begins.
    fn can_throttle(&self) -> bool {
        false
    }

    /// Makes the guest's processors pause for a [share of the time](Percent::pause_after) from now on, so that it
    /// dirties less. [`Percent::NONE`] lets them run freely. Called only with
    /// [`auto_converge`](super::MigrateOptions::auto_converge): with `NONE` at the beginning, with growing shares while
    /// the guest runs, and with `NONE` again when it has been stopped or the migration has failed. [`stop`](Self::stop)
    /// must not wait for the end of a pause.
    ///
    /// # Errors
    /// If it cannot be throttled; the migration then fails and the guest continues. The default implementation always
    /// fails.
    fn throttle(&mut self, stand: Percent) -> std::io::Result<()> {
        let _ = stand;
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// Refuses two devices with the same name and instance.
pub(super) fn check_distinct(devices: &[DeviceInfo]) -> Result<(), Usage> {
    let mut known = HashSet::with_capacity(devices.len());
    for device in devices {
        if !known.insert((&device.name, device.instance_id)) {
            let (name, instance) = (device.name.as_str().to_owned(), device.instance_id);
            return Err(Usage::DeviceTwice { name, instance });
        }
    }
    Ok(())
}

/// Refuses states that differ from the announced devices.
pub(super) fn check_saved(announced: &[DeviceInfo], saved: &[DeviceSection]) -> Result<(), Usage> {
    let refused = |name: &DeviceName, instance, why: String| {
        Err(Usage::DeviceState { name: name.as_str().to_owned(), instance, why })
    };
    let known: HashMap<_, _> =
        announced.iter().map(|device| ((&device.name, device.instance_id), device.most_bytes)).collect();
    let mut seen = HashSet::with_capacity(saved.len());
    for section in saved {
        let (name, instance) = (&section.name, section.instance_id);
        let Some(&most) = known.get(&(name, instance)) else {
            return refused(name, instance, "it was not announced by Guest::devices".into());
        };
        let length = section.data.len() as u64;
        if length > most {
            return refused(
                name,
                instance,
                format!("expected at most {most:#x} bytes, as announced, found {length:#x}"),
            );
        }
        if !seen.insert((name, instance)) {
            return refused(name, instance, "it was saved twice".into());
        }
    }
    let missing = announced.iter().find(|device| !seen.contains(&(&device.name, device.instance_id)));
    match missing {
        None => Ok(()),
        Some(device) => refused(
            &device.name,
            device.instance_id,
            "it was announced, but Guest::save did not save it".into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> DeviceName {
        DeviceName::new(name).expect("a name")
    }

    fn section(name: &str, instance_id: u32, length: usize) -> DeviceSection {
        DeviceSection { name: named(name), instance_id, version: 1, data: vec![0; length] }
    }

    #[test]
    fn devices_of_one_name_and_instance_are_refused() {
        let cpu = DeviceInfo::new(named("cpu"), 10);
        assert!(check_distinct(&[cpu.clone(), cpu.clone().instance(1)]).is_ok());
        let refused = check_distinct(&[cpu.clone(), cpu]).expect_err("refused").to_string();
        assert_eq!(refused, r#"device "cpu" instance 0 exists twice"#);
    }

    #[test]
    fn states_that_were_not_announced_are_refused_by_name() {
        let announced = [DeviceInfo::new(named("cpu"), 10), DeviceInfo::new(named("nic"), 20)];
        let check =
            |saved: &[DeviceSection]| check_saved(&announced, saved).map_err(|error| error.to_string());
        assert_eq!(check(&[section("nic", 0, 20), section("cpu", 0, 0)]), Ok(()));
        for (saved, why) in [
            (
                vec![section("cpu", 0, 1)],
                r#"device "nic" instance 0: it was announced, but Guest::save did not save it"#,
            ),
            (
                vec![section("cpu", 0, 11)],
                r#"device "cpu" instance 0: expected at most 0xa bytes, as announced, found 0xb"#,
            ),
            (vec![section("cpu", 1, 1)], r#"device "cpu" instance 1: it was not announced"#),
            (
                vec![section("cpu", 0, 1), section("cpu", 0, 1)],
                r#"device "cpu" instance 0: it was saved twice"#,
            ),
        ] {
            let refused = check(&saved).expect_err("refused");
            assert!(refused.starts_with(why), "{refused}");
        }
    }
}
