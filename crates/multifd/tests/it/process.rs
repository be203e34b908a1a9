//! A process migrates while its threads write without knowing of a dirty log.

use std::{
    io,
    sync::{Arc, RwLock},
    thread,
};

use multifd::{
    live::{DeviceInfo, DeviceSection, Guest, MigrateOptions, RunState},
    ram::{PageSize, PagemapLog},
};

use crate::kit;

/// Threads that know no log write to memory while it is migrated.
#[test]
fn a_process_that_keeps_writing_arrives_as_it_was_when_it_stopped() {
    let fresh = || kit::fresh(PageSize::KIB_4, &[("a", 4096 << 12), ("b", 101 << 12)]);
    let (source, destination) = (fresh(), fresh());
    (0..4096).for_each(|page| kit::write(&source, 0, page, 1));
    let mut log = match PagemapLog::start(source.clone()) {
        Ok(log) => log,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            return multifd_testkit::lacks(&error.to_string());
        }
        Err(error) => panic!("{error}"),
    };
    let stop = Arc::new(RwLock::new(false));
    let writers = (0..2).map(|thread| {
        let (source, stop) = (source.clone(), stop.clone());
        kit::spawn("writer", move || {
            let mut writes = 0;
            for at in 0.. {
                let stop = stop.read().expect("whole");
                if *stop {
                    break;
                }
                kit::write(&source, 0, (at * 2 + thread) % 600, at & 0xffff);
                writes += 1;
            }
            writes
        })
    });
    struct Process(Arc<RwLock<bool>>, Vec<thread::JoinHandle<u64>>);
    impl Guest for Process {
        fn devices(&self) -> Vec<DeviceInfo> {
            Vec::new()
        }
        fn run_state(&mut self) -> RunState {
            RunState::Running
        }
        fn stop(&mut self) -> io::Result<()> {
            *self.0.write().expect("whole") = true;
            let writes = self.1.drain(..).map(|writer| writer.join().expect("no panic"));
            assert!(writes.sum::<u64>() > 100, "the writers were busy");
            Ok(())
        }
        fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
            Ok(Vec::new())
        }
        fn resume(&mut self) {}
    }
    let mut process = Process(stop.clone(), writers.collect());
    let outcome = kit::migrate(&source, &destination, 2, MigrateOptions::new(), &mut log, &mut process);
    let sent = outcome.sent.expect("sent");
    outcome.received.expect("received");
    assert!(process.1.is_empty(), "stopped");
    assert_eq!(kit::difference(&source, &destination), None);
    assert!(
        sent.ram.normal > 4096 && sent.ram.duplicate < 8192,
        "only what was written is sent again: {sent:?}"
    );
}
