//! The flags of post-copy, for the verbs that send a guest from a file.

use clap::{ArgGroup, Args as ClapArgs};
use multifd::ram::BlockName;

use super::shared::{rate, size};

#[derive(Debug, ClapArgs)]
#[command(group = ArgGroup::new("postcopy").args(["postcopy_ram", "resume"]))]
pub(crate) struct PostcopyArgs {
    /// Start the guest and send its RAM while it runs; the destination has capability postcopy-ram on. FILE must stay unchanged
    /// until the end. WHEN: at-once, the default and the only value for a guest in a file
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, value_parser = at_once, default_missing_value = AT_ONCE)]
    pub(crate) postcopy_ram: Option<AtOnce>,
    /// Continue after a broken connection: the destination is in state postcopy-paused
    #[arg(long, conflicts_with = "postcopy_ram")]
    pub(crate) resume: bool,
    /// After a broken connection, try to resume until the destination has everything
    #[arg(long, requires = "postcopy")]
    pub(crate) retry: bool,
    /// Limit for pages that the guest does not wait for, in bytes per second, for example 100M (M = 1024 K); 0 = no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = rate, requires = "postcopy")]
    max_postcopy_bandwidth: u64,
    /// Neither use nor record FILE.working-set, the pages that are sent before the guest starts
    #[arg(long, requires = "postcopy")]
    pub(crate) no_working_set: bool,
    /// Size of the host pages behind a block at the destination, such as pc.ram=2M for huge pages; without NAME=, the page
    /// size of the system there; can be repeated
    #[arg(long, value_name = "[NAME=]SIZE", value_parser = host_page, requires = "postcopy")]
    pub(crate) host_page_size: Vec<HostPage>,
}

/// `--postcopy-ram`: the guest runs at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AtOnce;

fn at_once(text: &str) -> Result<AtOnce, String> {
    if text == AT_ONCE {
        return Ok(AtOnce);
    }
    if text.starts_with("after:") {
        return Err(
            "a guest in a file does not run, so a pre-copy part would only let it wait: leave the value out"
                .into(),
        );
    }
    Err(format!("expected {AT_ONCE}, found {text:?}"))
}

const AT_ONCE: &str = "at-once";

/// A host page size, of one block or of the system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPage {
    pub(crate) block: Option<BlockName>,
    pub(crate) bytes: u64,
}

fn host_page(text: &str) -> Result<HostPage, String> {
    let (block, bytes) = match text.rsplit_once('=') {
        None => (None, text),
        Some((name, bytes)) => {
            let refused = || format!("expected the name of a block of 1 to 255 bytes, found {name:?}");
            (Some(BlockName::new(name).ok_or_else(refused)?), bytes)
        }
    };
    let bytes = size(bytes)?;
    if bytes.is_power_of_two() {
        Ok(HostPage { block, bytes })
    } else {
        Err(format!("expected a power of two, found {bytes:#x} bytes"))
    }
}

impl PostcopyArgs {
    /// Whether the guest runs before its RAM is there.
    pub(crate) fn is_on(&self) -> bool {
        self.postcopy_ram.is_some() || self.resume
    }

    /// `None` is no limit.
    pub(crate) fn max_postcopy_bandwidth(&self) -> Option<u64> {
        Some(self.max_postcopy_bandwidth).filter(|bytes| *bytes > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_pages_have_a_size_that_is_a_power_of_two_and_maybe_a_block() {
        assert_eq!(host_page("64K"), Ok(HostPage { block: None, bytes: 64 << 10 }));
        let block = BlockName::new("a=b");
        assert_eq!(host_page("a=b=2M"), Ok(HostPage { block, bytes: 2 << 20 }));
        for nonsense in ["", "=2M", "pc.ram=", "3M", "0", "pc.ram"] {
            assert!(host_page(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn pre_copy_part_is_refused_with_the_reason() {
        assert!(at_once("at-once").is_ok());
        assert!(at_once("after:5").expect_err("refused").contains("does not run"));
        assert!(at_once("5").is_err());
    }
}
