//! A machine's whole life: it arrives, runs, leaves again, goes into a file and is restored from it, with the guide's
//! own code.

mod ends;
pub(crate) mod kit;
mod late;

use std::{thread, time::Duration};

use multifd::{
    Error,
    channel::Stop,
    error::{Usage, Violation},
    live::{MigrateOptions, ZeroPageDetection},
    ram::{BlockIndex, BlockName, NeverDirty, PageIndex, RamBlocks},
};
use qemu_stream::format::{BlockList, Configuration};

use crate::{arrive::arrive, leave::leave, machine::Machine, snapshot};
use kit::{RAM, Told, block, blocks, difference, fill, hop, listening, taken};

/// Regression: the second hop sent pages as zero that were zero when the machine arrived, regardless of later writes.
/// The record of an arrival existed as long as the blocks.
#[test]
fn the_manuals_machine_hops_ten_times_over_the_network_and_through_files_in_turns() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("machine");
    let mut machine = Machine::new(blocks(&[("ram", 2048)]), 0);
    machine.run();
    for hop in 0..10 {
        // Long enough to reach pages that were zero so far.
        thread::sleep(Duration::from_millis(5));
        let before = if hop % 2 == 0 {
            let (listener, address) = listening();
            let arriving =
                thread::spawn(move || arrive(listener, &Stop::new(), 1).map_err(|error| error.to_string()));
            leave(&mut machine, &address, &Stop::new()).expect("moved");
            let count = machine.count;
            machine = arriving.join().expect("no panic").expect("arrived");
            count
        } else {
            snapshot::save(&mut machine, &path, &Stop::new()).expect("kept");
            let count = machine.count;
            machine = snapshot::load(&path, &Stop::new()).expect("loaded");
            machine.run();
            count
        };
        machine.halt();
        assert!(machine.is_whole() && machine.count >= before, "hop {hop}");
        machine.run();
    }
}

/// Regression: pages of main were placed by the position of their block. In a different order half of them were wrong,
/// and both sides reported success.
#[test]
fn blocks_are_matched_by_name_in_any_order_over_channels_and_over_main() {
    for channels in [0, 1, 4] {
        for detection in [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd] {
            let source = blocks(&RAM);
            fill(&source);
            let options = MigrateOptions::new().zero_page_detection(detection);
            let reversed = |_: Option<&Configuration>, list: &BlockList| {
                let reversed = list.entries().iter().rev();
                Ok(RamBlocks::new(
                    reversed
                        .map(|entry| {
                            // Memory that another machine has used.
                            let block = block(&entry.name.to_string(), entry.used_length / 4096);
                            (0..block.pages()).for_each(|page| {
                                block.store(PageIndex(page), &[0xee; 4096]).expect("stored");
                            });
                            block
                        })
                        .collect(),
                )?)
            };
            let mut guest = Told::default();
            let (left, arrived) =
                hop(&source, channels, options, &mut NeverDirty, &mut guest, reversed, taken);
            left.expect("left");
            let (arrived, _) = arrived.expect("arrived");
            assert_eq!(difference(&source, &arrived), None, "{channels} channels, {detection:?}");
            assert_eq!((guest.stops, guest.resumes), (1, 0));
        }
    }
}

#[test]
fn blocks_that_are_not_those_announced_are_refused_by_name_and_the_guest_goes_on() {
    let wrong: [(&[(&str, u64)], Usage); 4] = [
        (&RAM[..2], Usage::BlockMissing(BlockName::new("rom").expect("a name"))),
        (
            &[("low", 64), ("high", 32), ("rom", 8)],
            Usage::BlockLength {
                name: BlockName::new("high").expect("a name"),
                announced: 64 << 12,
                found: 32 << 12,
            },
        ),
        (
            &[("low", 64), ("high", 64), ("rom", 8), ("more", 1)],
            Usage::BlockSurplus(BlockName::new("more").expect("a name")),
        ),
        (
            &[("first", 1), ("low", 64), ("high", 64)],
            Usage::BlockMissing(BlockName::new("rom").expect("a name")),
        ),
    ];
    for (list, expected) in wrong {
        for channels in [0, 2] {
            let source = blocks(&RAM);
            fill(&source);
            let mut guest = Told::default();
            let make = move |_: Option<&Configuration>, _: &BlockList| {
                Ok(RamBlocks::new(list.iter().map(|(name, pages)| block(name, *pages)).collect())?)
            };
            let options = MigrateOptions::new();
            let (left, arrived) = hop(&source, channels, options, &mut NeverDirty, &mut guest, make, taken);
            let error = arrived.expect_err("refused");
            let mut causes = multifd::error::chain(&error);
            assert!(causes.any(|cause| cause.to_string() == expected.to_string()), "{error:?}");
            left.expect_err("refused");
            assert_eq!(guest.stops, guest.resumes);
        }
    }
}

/// A destination for which announced pages never arrive does not take the guest.
#[test]
fn ram_with_holes_is_refused() {
    let receiver = multifd::Receiver::new(multifd::ReceiveOptions::new(), Stop::new());
    receiver.set_blocks(blocks(&[("ram", 8)])).expect("set");
    let arrived = receiver.arrived().expect("set above");
    for page in (0..8).filter(|page| *page != 6) {
        arrived.clear(BlockIndex(0), PageIndex(page)).expect("cleared");
    }
    let error = arrived.check_complete(|_| multifd::MayMiss::Nothing).expect_err("a hole");
    assert!(matches!(error.kind(), Error::Violation(Violation::PagesMissing { missing: 1, .. })), "{error}");
}
