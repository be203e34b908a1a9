//! `multifd receive --dir`: one machine after another, several at a time, each into a new file.
//!
//! ```text
//! jobs: job ─ lent listener ─▶ Reception (as `receive`) ─▶ file ─▶ its name ─▶ the next machine
//!        └── crew: what each job does, for signals and for the service manager
//! ```
//!
//! Each job is a thread with an address of its own, where one machine arrives at a time: the connections of two machines at one
//! address cannot be distinguished. The failure of a machine ends no job.

mod crew;
mod job;
mod lent;
mod target;

use std::{fs::File, os::unix::fs::OpenOptionsExt, path::Path, process, sync::Arc, thread};

use crew::Crew;
use job::Job;
use multifd::channel::Listener;

use super::tls;
use crate::{
    args::ReceiveArgs,
    combinations, interrupt,
    output::{
        outcome::{Failure, While},
        outlet::{say, shown},
    },
    service,
};

/// Receives machines until a signal ends it.
pub(crate) fn run(args: &ReceiveArgs, dir: &Path) -> Result<(), Failure> {
    // The parser does not check what a flag requires if that conflicts with another one. So conflicts are checked here.
    if args.file.is_some() {
        return Err(Failure::Usage("FILE cannot be used with --dir, which names the files".into()));
    }
    if args.force {
        return Err(Failure::Usage("--force cannot be used with --dir, which never replaces a file".into()));
    }
    if let Some(flag) = args.of_one_run() {
        return Err(Failure::Usage(
            format!("{flag} is for one machine and cannot be used with --dir").into(),
        ));
    }
    let addresses = args.listen.of_jobs(args.many.jobs)?;
    for address in &addresses {
        combinations::of_receive(args, address, dir)?;
    }
    let folder = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(dir);
    drop(folder.map_err(|error| While::new(format!("cannot open folder {}", shown(dir)), error))?);
    let crew = Arc::new(Crew::new(addresses.len()));
    interrupt::counts({
        let crew = crew.clone();
        move |count| match count {
            1 => {
                service::stopping();
                crew.close();
            }
            2 => crew.cancel(),
            _ => process::exit(130),
        }
    })?;
    interrupt::spares_large_files();
    let credentials = tls::credentials(args)?;
    let mut jobs = Vec::new();
    for (address, number) in addresses.iter().zip(1..) {
        let listener = Listener::bind(address)
            .map_err(|error| While::new(format!("cannot listen at {address}"), error))?;
        let shown = listener.local_address().to_string();
        let listener = tls::listen(credentials.clone(), listener);
        if listener.is_single() {
            let why = "it is one connection, and --dir takes one machine after another";
            return Err(Failure::Usage(While::new(format!("cannot listen at {address}"), why).into()));
        }
        jobs.push((shown, Job { number, args, dir, crew: crew.clone(), listener }));
    }
    for (address, job) in &jobs {
        say(&format!("job {}: listening on {address}", job.number));
    }
    service::ready();
    crew.report();
    thread::scope(|threads| {
        let started: Vec<_> = jobs
            .into_iter()
            .map(|(_, job)| {
                let thread = thread::Builder::new().name(format!("job_{}", job.number));
                thread.spawn_scoped(threads, move || job.run())
            })
            .collect();
        // A job that could not be started ends the others, so that the error is seen.
        if started.iter().any(Result::is_err) {
            crew.close();
        }
        let ended = started.into_iter().map(|thread| match thread?.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        // All are joined, also after the first failure.
        let ended: Vec<Result<(), Failure>> = ended.collect();
        ended.into_iter().collect::<Result<(), Failure>>()
    })?;
    if crew.is_cancelled() { Err(Failure::Interrupted) } else { Ok(()) }
}
