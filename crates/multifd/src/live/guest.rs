//! What a migration asks of the guest whose RAM moves.

use crate::{
    error::{Result, Usage},
    outcome::Percent,
};

/// Whether a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Its processors run, or would if a migration had not stopped them.
    Running,
    /// Somebody has paused it, and it is to stay so wherever it goes.
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceSection {
    /// The device's name, 1 to 255 bytes.
    pub name: String,
    /// Which of several devices of that name.
    pub instance_id: u32,
    /// The version of the state's layout.
    pub version: u32,
    /// The state.
    pub data: Vec<u8>,
}

/// A device whose state a guest will give: what can be checked while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As in its [section](DeviceSection::name).
    pub name: String,
    /// As in its [section](DeviceSection::instance_id).
    pub instance_id: u32,
    /// The most bytes that its state may take.
    pub most_bytes: u64,
}

impl DeviceInfo {
    /// The only device of this name.
    pub fn new(name: impl Into<String>, most_bytes: u64) -> Self {
        Self { name: name.into(), instance_id: 0, most_bytes }
    }

    /// Another instance of a device of this name.
    #[must_use]
    pub fn instance(mut self, instance_id: u32) -> Self {
        self.instance_id = instance_id;
        self
    }
}

/// The guest whose RAM moves.
///
/// A panic in one of these calls ends the migration as an error does.
pub trait Guest {
    /// The devices that [`save`](Guest::save) will give, each with the most bytes that its state may take. Asked before
    /// anything is sent: names that are twice or cannot be sent, and more state than a destination takes, are refused then.
    fn devices(&self) -> Vec<DeviceInfo>;

    /// Whether the guest runs, or is paused. Asked right before [`stop`](Guest::stop), on the same thread: what it says is
    /// what the guest will be at the destination, or here again if the migration fails.
    ///
    /// **Warning:** who pauses the guest from another thread after that, while it stands for the migration, is not seen
    /// here: refuse that, or have [`resume`](Guest::resume) heed it, else the guest runs though its operator has paused it.
    fn run_state(&mut self) -> RunState;

    /// Stops the guest; one that is [paused](RunState::Paused) already stays so. From its return on nothing writes to RAM: no
    /// processor, no device, no request under way. What is written nevertheless fails the migration, if the dirty log has it.
    ///
    /// # Errors
    /// If it cannot be stopped. It must then be as it was before; [`resume`](Guest::resume) is not called, and the migration
    /// fails.
    fn stop(&mut self) -> std::io::Result<()>;

    /// Gives the state of the stopped guest's devices. With
    /// [`pause_before_switchover`](super::MigrateOptions::pause_before_switchover) that is after the pause, so what is
    /// drained meanwhile is in the devices and in RAM alike. It may write to RAM.
    ///
    /// # Errors
    /// If a state cannot be had; the migration then fails and the guest goes on.
    fn save(&mut self) -> std::io::Result<Vec<DeviceSection>>;

    /// Lets the guest go on: the migration has failed or was cancelled, and the guest [ran](Guest::run_state) before it was
    /// stopped. Called, too, when [`stop`](Guest::stop) has panicked, however far that came: the guest may still run.
    fn resume(&mut self);

    /// Whether [`throttle`](Guest::throttle) is written. If not, a migration with
    /// [`auto_converge`](super::MigrateOptions::auto_converge) is refused before it begins.
    fn can_throttle(&self) -> bool {
        false
    }

    /// Has the guest's processors stand for a [share of the time](Percent::pause_after) from now on, so that it dirties
    /// less; [`Percent::NONE`] lets them run freely. Called with [`auto_converge`](super::MigrateOptions::auto_converge)
    /// alone: with none at the beginning, with more and more while the guest runs, and with none again when it has been
    /// stopped or the migration has failed. [`stop`](Self::stop) must not wait for a turn to end.
    ///
    /// # Errors
    /// If it cannot be held back; the migration then fails and the guest runs on. Unless it is written, it always fails.
    fn throttle(&mut self, stand: Percent) -> std::io::Result<()> {
        let _ = stand;
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// Refuses devices of one name and instance.
pub(super) fn check_distinct(devices: &[DeviceInfo]) -> Result<(), Usage> {
    for (at, device) in devices.iter().enumerate() {
        if devices[..at]
            .iter()
            .any(|other| (&other.name, other.instance_id) == (&device.name, device.instance_id))
        {
            let (name, instance) = (device.name.clone(), device.instance_id);
            return Err(Usage::DeviceTwice { name, instance });
        }
    }
    Ok(())
}

/// Refuses states that are not those announced.
pub(super) fn check_saved(announced: &[DeviceInfo], saved: &[DeviceSection]) -> Result<(), Usage> {
    let refused =
        |name: &str, instance, why: String| Err(Usage::DeviceState { name: name.to_owned(), instance, why });
    for (at, section) in saved.iter().enumerate() {
        let (name, instance) = (&section.name, section.instance_id);
        let of = |device: &&DeviceInfo| (&device.name, device.instance_id) == (name, instance);
        let Some(device) = announced.iter().find(of) else {
            return refused(name, instance, "it was not announced by Guest::devices".into());
        };
        let length = section.data.len() as u64;
        if length > device.most_bytes {
            let most = device.most_bytes;
            return refused(name, instance, format!("{length:#x} bytes, announced were at most {most:#x}"));
        }
        if saved[..at].iter().any(|other| (&other.name, other.instance_id) == (name, instance)) {
            return refused(name, instance, "it was given twice".into());
        }
    }
    let missing = announced.iter().find(|device| {
        !saved
            .iter()
            .any(|section| (&section.name, section.instance_id) == (&device.name, device.instance_id))
    });
    match missing {
        None => Ok(()),
        Some(device) => {
            refused(&device.name, device.instance_id, "it was announced and not given by Guest::save".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(name: &str, instance_id: u32, length: usize) -> DeviceSection {
        DeviceSection { name: name.into(), instance_id, version: 1, data: vec![0; length] }
    }

    #[test]
    fn devices_of_one_name_and_instance_are_refused() {
        let cpu = DeviceInfo::new("cpu", 10);
        assert!(check_distinct(&[cpu.clone(), cpu.clone().instance(1)]).is_ok());
        let refused = check_distinct(&[cpu.clone(), cpu]).expect_err("refused").to_string();
        assert_eq!(refused, r#"device "cpu" instance 0 is there twice"#);
    }

    #[test]
    fn states_that_were_not_announced_are_refused_by_name() {
        let announced = [DeviceInfo::new("cpu", 10), DeviceInfo::new("nic", 20)];
        let check =
            |saved: &[DeviceSection]| check_saved(&announced, saved).map_err(|error| error.to_string());
        assert_eq!(check(&[section("nic", 0, 20), section("cpu", 0, 0)]), Ok(()));
        for (saved, why) in [
            (vec![section("cpu", 0, 1)], r#"device "nic" instance 0: it was announced and not given"#),
            (
                vec![section("cpu", 0, 11)],
                r#"device "cpu" instance 0: 0xb bytes, announced were at most 0xa"#,
            ),
            (vec![section("cpu", 1, 1)], r#"device "cpu" instance 1: it was not announced"#),
            (
                vec![section("cpu", 0, 1), section("cpu", 0, 1)],
                r#"device "cpu" instance 0: it was given twice"#,
            ),
        ] {
            let refused = check(&saved).expect_err("refused");
            assert!(refused.starts_with(why), "{refused}");
        }
    }
}
