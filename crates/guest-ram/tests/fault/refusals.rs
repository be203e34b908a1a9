//! What cannot be armed is refused before anything is armed.

use std::{
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    sync::Arc,
};

use guest_ram::{
    Access, Armed, DeviceState, FaultError, FaultsFrom, Features, Mapping, Modes, PageIndex, RamBlocks,
    Userfault,
};
use rustix::fs::MemfdFlags;

use crate::kit::{self, BLOCK};

#[test]
fn memory_with_contents_is_refused_where_empty_memory_is_needed() {
    for kind in kit::kinds(2) {
        let page = kind.host_page >> 12;
        kit::page_of(&kind.blocks, page).copy_from(&[1; 4096]);
        let Some(userfault) = kit::open(Features::NONE) else { return };
        let refused = Armed::arm_empty(userfault, kind.blocks.clone()).expect_err("not empty");
        match refused {
            FaultError::NotEmpty { offset, .. } => assert_eq!(offset.0, kind.host_page, "{}", kind.name),
            other => panic!("{}: {other}", kind.name),
        }
    }
}

#[test]
fn what_is_armed_or_watched_already_is_refused() {
    let Some((first, second)) = kit::open(Features::NONE).zip(kit::open(Features::NONE)) else { return };
    let blocks = kit::anonymous(2);
    let armed = Armed::arm_empty(first, blocks.clone()).expect("armed");
    let refused = Armed::arm(second, blocks.clone(), Modes::MISSING).expect_err("armed already");
    assert!(matches!(refused, FaultError::Watched { .. }), "{refused}");
    // The other one is still armed.
    let reader = kit::reader(&blocks, 1);
    assert_eq!(kit::events(&armed).len(), 1);
    drop(armed);
    reader.result();
}

#[test]
fn if_one_block_is_refused_none_stays_armed() {
    let file = kit::memfd(2 << 12, MemfdFlags::empty()).expect("a memfd");
    let read_only = Mapping::of_file(&file, 0, 2 << 12, Access::Read).expect("mapped");
    let blocks = vec![
        kit::block("first", 2 << 12, Mapping::anonymous(2 << 12).expect("memory")),
        kit::block("second", 2 << 12, read_only),
    ];
    let blocks = Arc::new(RamBlocks::new(blocks).expect("two blocks"));
    let Some(userfault) = kit::open(Features::NONE) else { return };
    let refused = Armed::arm(userfault, blocks.clone(), Modes::MISSING).expect_err("read-only");
    let text = r#"block "second": its memory cannot be armed: it is mapped for reading only"#;
    assert_eq!(refused.to_string(), text);
    assert_eq!(kit::read_page(&blocks, 1), [0; 4096]);
}

#[test]
fn a_file_on_a_disk_and_a_part_of_a_page_are_refused() {
    let file = tempfile::tempfile_in(".").expect("a file");
    file.set_len(1 << 20).expect("sized");
    let mapping = Mapping::of_file(&file, 0, 1 << 20, Access::ReadWrite).expect("mapped");
    let Some(userfault) = kit::open(Features::NONE) else { return };
    let refused = Armed::arm(userfault, kit::blocks(1 << 20, mapping), Modes::MISSING).expect_err("a file");
    assert!(matches!(refused, FaultError::Unsuitable { .. }), "{refused}");

    let Some(userfault) = kit::open(Features::NONE) else { return };
    let outer = Arc::new(Mapping::anonymous(4 << 12).expect("memory"));
    let base = outer.slice(512, 1).expect("inside").as_ptr();
    let base = std::ptr::NonNull::new(base).expect("not null");
    // SAFETY: the range lies in a mapping that is kept alive, and no reference to it is made.
    #[expect(unsafe_code, reason = "memory that begins within a page")]
    let part = unsafe { Mapping::from_raw(base, 2 << 12, outer) };
    let refused = Armed::arm(userfault, kit::blocks(2 << 12, part), Modes::MISSING).expect_err("a part");
    assert!(refused.to_string().contains("boundary of host pages"), "{refused}");
}

#[test]
#[cfg(feature = "pagemap")]
fn a_dirty_log_of_the_page_table_and_an_armament_exclude_each_other() {
    let blocks = kit::anonymous(2);
    let Ok(log) = guest_ram::PagemapLog::start(blocks.clone()) else {
        multifd_testkit::lacks("asynchronous write protection");
        return;
    };
    let Some(userfault) = kit::open(Features::NONE) else { return };
    let refused = Armed::arm(userfault, blocks.clone(), Modes::MISSING).expect_err("watched");
    assert!(matches!(refused, FaultError::Watched { .. }), "{refused}");
    drop(log);
    let Some(userfault) = kit::open(Features::NONE) else { return };
    let armed = Armed::arm(userfault, blocks.clone(), Modes::MISSING).expect("armed");
    assert!(guest_ram::PagemapLog::start(blocks).is_err());
    drop(armed);
}

/// Runs the function of this name without privileges, in another process.
fn without_privileges(test: &str) -> bool {
    let program = std::env::current_exe().expect("this test");
    let mut command = Command::new(program);
    command.args(["--ignored", "--exact", test, "--nocapture"]).env(UNPRIVILEGED, "1");
    command.uid(65534).gid(65534).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            multifd_testkit::skip(&format!("a process of another user cannot be started: {error}"));
            return false;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    true
}

const UNPRIVILEGED: &str = "GUEST_RAM_TEST_UNPRIVILEGED";

#[test]
fn a_process_without_privileges_gets_the_remedy_and_its_own_faults() {
    without_privileges("refusals::unprivileged");
}

/// Not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn unprivileged() {
    if std::env::var_os(UNPRIVILEGED).is_none() {
        return;
    }
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    let device = std::path::Path::new("/dev/userfaultfd").exists();
    match Userfault::open(Features::NONE, FaultsFrom::Everything) {
        Ok(_) => assert!(sysctl.trim() == "1" || device, "allowed without a reason"),
        Err(error @ FaultError::NotPermitted { .. }) => {
            let text = error.to_string();
            assert!(text.contains("vm.unprivileged_userfaultfd is 0"), "{text}");
            let FaultError::NotPermitted { device: state, .. } = error else { unreachable!() };
            assert_eq!(state, if device { DeviceState::Refused } else { DeviceState::Missing });
        }
        Err(other) => panic!("{other}"),
    }
    let userfault = Userfault::open(Features::NONE, FaultsFrom::UserMode).expect("no privilege is needed");
    let blocks = kit::anonymous(1);
    let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
    let reader = kit::reader(&blocks, 0);
    assert_eq!(kit::events(&armed).len(), 1);
    armed.zero(BLOCK, guest_ram::BlockOffset(0), 4096).expect("placed");
    reader.result();
    assert!(blocks.block(BLOCK).expect("there").slice(PageIndex(0), 1).is_some());
}
