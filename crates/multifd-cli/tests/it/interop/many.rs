//! `multifd receive --dir` with real sources: several at a time, one after another at the same address.

use multifd_testkit::qemu::{Error, Qemu, Vm};
use rustix::process::Signal;

use crate::kit::{
    Program, assert_left, folder, leave, machine, multifd, path, runs_on, send, source, stored_memory,
};

const JOBS: usize = 3;

fn uuid(at: usize) -> String {
    format!("00112233-4455-6677-8899-{at:012}")
}

fn machines_arrive_at_once_and_each_is_restored_as_itself(qemu: &Qemu) -> Result<(), Error> {
    let dir = folder();
    let mut command = multifd(["receive", "--dir"]);
    command.arg(dir.path()).args(["--jobs", &JOBS.to_string(), "--name", "{name}.ram", "tcp:127.0.0.1:0"]);
    let receive = Program::start(&mut command);
    let addresses: Vec<String> = (0..JOBS)
        .map(|_| receive.next_line().split_once("listening on ").expect("an address").1.to_owned())
        .collect();
    for round in 0..2 {
        std::thread::scope(|threads| {
            let sources: Vec<_> = addresses
                .iter()
                .enumerate()
                .map(|(job, address)| {
                    threads.spawn(move || -> Result<(Vm, usize), Error> {
                        let at = round * JOBS + job;
                        let mut from = source(machine(qemu, &qemu.machine()).uuid(&uuid(at)))?;
                        // The second machines have no channels, and no UUID in the stream.
                        if round == 0 {
                            from.set_multifd_channels(2)?;
                        }
                        leave(&mut from, address, at.is_multiple_of(2).then_some(3))?;
                        Ok((from, at))
                    })
                })
                .collect();
            for from in sources {
                let (from, at) = from.join().expect("no panic")?;
                if round == 1 {
                    continue;
                }
                let file = path(&dir, &format!("{}.ram", uuid(at)));
                let mut to = machine(qemu, &qemu.machine()).uuid(&uuid(at)).incoming().start()?;
                to.set_multifd_channels(2)?;
                send(&["--multifd-channels", "2"], &file, &mut to, "tcp:127.0.0.1:0")?;
                if at.is_multiple_of(2) {
                    runs_on(&from, &mut to)?;
                }
                assert!(!stored_memory(&file).is_empty());
            }
            Ok::<(), Error>(())
        })?;
    }
    receive.signal(Signal::TERM);
    let ended = receive.done();
    assert_eq!(ended.stderr.matches(": received ").count(), 2 * JOBS, "{ended:?}");
    let mut names: Vec<String> = (0..JOBS).map(|at| format!("{}.ram", uuid(at))).collect();
    names.extend((JOBS + 1..=2 * JOBS).map(|number| format!("machine-{number}.ram")));
    assert_left(&dir, &names.iter().map(String::as_str).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn machines_arrive_at_once_and_each_is_restored_as_itself_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    machines_arrive_at_once_and_each_is_restored_as_itself(&qemu).unwrap();
}

#[test]
fn machines_arrive_at_once_and_each_is_restored_as_itself_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    machines_arrive_at_once_and_each_is_restored_as_itself(&qemu).unwrap();
}
