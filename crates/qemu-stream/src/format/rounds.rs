//! The values of PING and PONG with which two ends of this library agree to continue without a broken channel. For a QEMU they are PINGs
//! like any other.

use multifd::wire::ChannelId;

/// The value of the PING after a sync point: the source asks which channels are lost, and sends their pages again.
pub(crate) const ROUND_PING: u32 = 0x6d66_6a01;

/// The value of the PONG, without a PING, by which a destination says that it continues without a channel that breaks. The PONG of
/// [`ROUND_PING`] follows.
pub(crate) const ROUND_MARK: u32 = 0x6d66_6a02;

/// The value of a PING or PONG that names a lost channel: 24 bits, and the channel's id in the last byte.
const LOST_MARK: u32 = 0x6d66_6b00;

/// The value that names a lost channel.
pub(crate) fn lost_channel(id: ChannelId) -> u32 {
    LOST_MARK | u32::from(id.0)
}

/// The lost channel that a value names, if it names one.
pub(crate) fn as_lost_channel(value: u32) -> Option<ChannelId> {
    (value & !0xff == LOST_MARK).then(|| ChannelId(value.to_be_bytes()[3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_names_the_channel_that_it_was_made_for_and_others_name_none() {
        for id in 0..=u8::MAX {
            assert_eq!(as_lost_channel(lost_channel(ChannelId(id))), Some(ChannelId(id)));
        }
        for value in [0, ROUND_PING, ROUND_MARK, LOST_MARK - 1, LOST_MARK + 0x100, u32::MAX] {
            assert_eq!(as_lost_channel(value), None, "{value:#x}");
        }
    }
}
