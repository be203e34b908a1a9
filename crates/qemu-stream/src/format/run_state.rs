//! The run state of the guest: the section "globalstate" of QEMU's devices.
//!
//! ```text
//! u32 length of the name with its NUL | 100 bytes: the name, NUL, and data of newer versions
//! ```
//!
//! QEMU sends it with machine types from 2.4 on, in version 1 (observed with 7.2 and 10.0).

use multifd::live::RunState;

use super::{Device, Put, SectionName};

pub(crate) const NAME: &str = "globalstate";
const VERSION: u32 = 1;
const NAME_BYTES: usize = 100;

/// The section for a guest in this state.
pub(crate) fn section(state: RunState) -> Device {
    let text = state.as_str();
    let mut bytes = Vec::with_capacity(4 + NAME_BYTES);
    bytes.put_u32(u32::try_from(text.len() + 1).unwrap_or(u32::MAX));
    bytes.put(text.as_bytes());
    bytes.resize(4 + NAME_BYTES, 0);
    let name = SectionName::new(NAME).expect("1 to 255 bytes without NUL");
    Device { name, instance: 0, version: VERSION, state: bytes }
}

/// Decodes the body of the section. A name other than `running`, such as `shutdown` or `internal-error`, does not let a
/// guest run. `None` if there is no name.
pub(crate) fn decode(body: &[u8]) -> Option<RunState> {
    let name = body.get(4..)?;
    let end = name.iter().take(NAME_BYTES).position(|byte| *byte == 0)?;
    match name.get(..end)? {
        b"" => None,
        b"running" => Some(RunState::Running),
        _ => Some(RunState::Paused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From a capture of 10.0.2.
    const RUNNING: &[u8] = b"\0\0\0\x08running\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0";

    #[test]
    fn state_of_a_real_qemu_is_understood() {
        assert_eq!(decode(RUNNING), Some(RunState::Running));
        assert_eq!(decode(b"\0\0\0\x0ashutdown\0"), Some(RunState::Paused));
        for none in [&b""[..], b"\0\0\0", b"\0\0\0\x01\0", b"\0\0\0\x08running"] {
            assert_eq!(decode(none), None);
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for state in [RunState::Running, RunState::Paused] {
            let section = section(state);
            assert_eq!((decode(&section.state), section.state.len()), (Some(state), 104));
        }
    }
}
