//! A QMP client: one command, one answer, every wait with a deadline.
//!
//! Events that arrive in between are kept in order of arrival until they are requested.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Error;

/// A connection to a monitor whose capabilities have been negotiated.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    /// Bytes that have arrived and are not a whole line yet.
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Reads the greeting and negotiates no capability.
    pub(super) fn new(stream: UnixStream) -> Result<Self, Error> {
        let mut qmp = Self { stream, partial: Vec::new(), events: VecDeque::new() };
        let greeting = qmp.message(Instant::now() + ANSWER)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Unmet(format!("expected a QMP greeting, found {greeting}")));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its result.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream.write_all(text.as_bytes()).map_err(|cause| gone(command, &cause))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut message = self.message(deadline).map_err(|error| match error {
                Error::Unmet(text) => Error::Unmet(format!("{command}: {text}")),
                Error::Gone(text) => Error::Gone(format!("{command}: {text}")),
                other => other,
            })?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
                return Err(Error::Refused {
                    command: command.to_owned(),
                    class: field("class"),
                    text: field("desc"),
                });
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(Error::Unmet(format!("{command}: expected an answer, found {message}")));
            }
        }
    }

    /// Waits for an event with this name and drops the events before it.
    pub(super) fn wait_event(&mut self, name: &str, patience: Duration) -> Result<Value, Error> {
        let deadline = Instant::now() + patience;
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => self.message(deadline).map_err(|error| match error {
                    Error::Unmet(text) => Error::Unmet(format!("event {name}: {text}")),
                    other => other,
                })?,
            };
            if message["event"] == name {
                return Ok(message);
            }
        }
    }

    /// The next line, parsed as JSON.
    fn message(&mut self, deadline: Instant) -> Result<Value, Error> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|cause| {
                    Error::Unmet(format!(
                        "expected JSON, found {:?}: {cause}",
                        String::from_utf8_lossy(&line)
                    ))
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Unmet("no answer in time: the monitor is stuck".into()));
            }
            self.stream.set_read_timeout(Some(left)).map_err(Error::system("QMP socket"))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Error::Gone("the monitor was closed".into())),
                Ok(length) => self.partial.extend_from_slice(&bytes[..length]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(gone("read", &e)),
            }
        }
    }
}

fn gone(command: &str, cause: &io::Error) -> Error {
    Error::Gone(format!("{command}: the monitor is gone: {cause}"))
}

/// The time limit of a command. Saving all memory is the slowest.
const ANSWER: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// A monitor that sends these lines in these parts, one part after each command.
    fn monitor(bits: &'static [&'static str]) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            theirs.write_all(b"{\"QMP\": {}}\n").unwrap();
            for bit in bits {
                let mut heard = [0; 4096];
                if theirs.read(&mut heard).unwrap() == 0 {
                    return;
                }
                theirs.write_all(bit.as_bytes()).unwrap();
            }
        });
        ours
    }

    #[test]
    fn events_before_an_answer_are_kept() {
        let stream = monitor(&["{\"return\": {}}\n", "{\"event\": \"STOP\"}\n{\"return\": 5}\n"]);
        let mut qmp = Qmp::new(stream).unwrap();
        assert_eq!(qmp.execute("stop", json!({})).unwrap(), 5);
        assert_eq!(qmp.wait_event("STOP", Duration::ZERO).unwrap(), json!({ "event": "STOP" }));
    }

    #[test]
    fn refusal_carries_the_text_of_the_peer() {
        let stream = monitor(&[
            "{\"return\": {}}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n",
        ]);
        let error = Qmp::new(stream).unwrap().execute("x", json!({})).unwrap_err();
        assert_eq!(error.refusal(), Some("no such thing"));
        assert_eq!(error.to_string(), "x refused: GenericError: no such thing");
    }

    #[test]
    fn closed_monitor_is_told_from_a_silent_one() {
        let closed = Qmp::new(monitor(&["{\"return\": {}}\n"])).unwrap().execute("x", json!({})).unwrap_err();
        assert!(matches!(closed, Error::Gone(_)), "{closed}");
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut qmp = Qmp { stream: ours, partial: Vec::new(), events: VecDeque::new() };
        let silent = qmp.wait_event("STOP", Duration::from_millis(20)).unwrap_err();
        assert!(matches!(silent, Error::Unmet(_)), "{silent}");
    }
}
