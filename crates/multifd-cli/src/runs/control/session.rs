//! The commands of one client, in the form of QMP: its bytes come in, and a reply to each command goes out.

use std::time::Duration;

use multifd::parameters::DOWNTIME_LIMIT;
use serde_json::{Deserializer, Map, Value, json};

use super::super::observed::{Limits, Observed};

/// A client.
pub(super) struct Session<'a> {
    run: &'a Observed,
    /// Bytes that are not a whole command yet.
    unread: Vec<u8>,
    /// The client has sent `qmp_capabilities`.
    negotiated: bool,
}

/// What follows a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Continue,
    /// The client's bytes make no sense.
    Disconnect,
    /// The run is cancelled.
    Cancel,
}

impl<'a> Session<'a> {
    pub(super) fn new(run: &'a Observed) -> Self {
        Self { run, unread: Vec::new(), negotiated: false }
    }

    /// The first line to the client. It has the version of this program where QEMU has its own.
    pub(super) fn greeting(&self) -> String {
        let number = |text: &str| text.parse::<u32>().unwrap_or(0);
        let version = json!({
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        });
        line(&json!({ "QMP": { "version": { "qemu": version, "package": "multifd" }, "capabilities": [] } }))
    }

    /// The client has sent these bytes.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
    }

    /// The reply to the next command; `None` if no whole command has arrived.
    pub(super) fn next_reply(&mut self) -> Option<(String, Then)> {
        let mut values = Deserializer::from_slice(&self.unread).into_iter::<Value>();
        let parsed = values.next();
        let read = values.byte_offset();
        let invalid = match parsed {
            Some(Ok(request)) => {
                self.unread.drain(..read);
                return Some(self.reply(&request));
            }
            None => {
                self.unread.clear();
                return None;
            }
            Some(Err(error)) if error.is_eof() && self.unread.len() <= LONGEST => return None,
            Some(Err(error)) if error.is_eof() => "the command is too long".to_owned(),
            Some(Err(error)) => format!("the command is not JSON: {error}"),
        };
        self.unread.clear();
        Some((line(&Refusal::generic(invalid).reply()), Then::Disconnect))
    }

    fn reply(&mut self, request: &Value) -> (String, Then) {
        let (mut reply, then) = match self.execute(request) {
            Ok((result, then)) => (json!({ "return": result }), then),
            Err(refusal) => (refusal.reply(), Then::Continue),
        };
        if let (Some(id), Some(fields)) = (request.get("id"), reply.as_object_mut()) {
            fields.insert("id".into(), id.clone());
        }
        (line(&reply), then)
    }

    fn execute(&mut self, request: &Value) -> Result<(Value, Then), Refusal> {
        let (command, arguments) = parts(request)?;
        let nothing = || if arguments.is_empty() { Ok(json!({})) } else { Err(unexpected(&arguments)) };
        if !self.negotiated {
            if command != NEGOTIATION {
                return Err(Refusal::unknown(format!("expecting {NEGOTIATION} before {command:?}")));
            }
            self.negotiated = true;
            // Clients may enable capabilities; the greeting offers none.
            return Ok((json!({}), Then::Continue));
        }
        match command {
            "query-migrate" => {
                nothing()?;
                let (report, _) = self.run.now();
                let report = serde_json::to_value(&report);
                let report = report.map_err(|error| Refusal::generic(error.to_string()))?;
                Ok((report, Then::Continue))
            }
            "migrate_cancel" => Ok((nothing()?, Then::Cancel)),
            "migrate-set-parameters" => {
                self.run.adjust(&limits(&arguments)?).map_err(Refusal::generic)?;
                Ok((json!({}), Then::Continue))
            }
            _ => Err(Refusal::unknown(format!(
                "the command {command:?} is not known; known are query-migrate, migrate_cancel and \
                 migrate-set-parameters"
            ))),
        }
    }
}

/// The name and the arguments of a command.
fn parts(request: &Value) -> Result<(&str, Map<String, Value>), Refusal> {
    let fields = request.as_object().ok_or_else(|| Refusal::generic("expected an object".into()))?;
    if let Some(other) = fields.keys().find(|key| !["execute", "arguments", "id"].contains(&key.as_str())) {
        return Err(Refusal::generic(format!("the field {other:?} is unexpected")));
    }
    let command = fields.get("execute").and_then(Value::as_str);
    let command =
        command.ok_or_else(|| Refusal::generic("expected a command in the field execute".into()))?;
    match fields.get("arguments") {
        None => Ok((command, Map::new())),
        Some(Value::Object(arguments)) => Ok((command, arguments.clone())),
        Some(_) => Err(Refusal::generic("expected an object in the field arguments".into())),
    }
}

/// The limits in the arguments of `migrate-set-parameters`, each in its range.
fn limits(arguments: &Map<String, Value>) -> Result<Limits, Refusal> {
    let mut limits = Limits::default();
    for (name, value) in arguments {
        let number = || {
            let number = value.as_u64();
            number
                .ok_or_else(|| Refusal::generic(format!("expected a whole number for {name}, found {value}")))
        };
        match name.as_str() {
            "max-bandwidth" => limits.max_bandwidth = Some(number()?),
            "max-postcopy-bandwidth" => limits.max_postcopy_bandwidth = Some(number()?),
            "downtime-limit" => {
                let millis = number()?;
                DOWNTIME_LIMIT.check(millis).map_err(|refused| Refusal::generic(refused.to_string()))?;
                limits.downtime_limit = Some(Duration::from_millis(millis));
            }
            _ => {
                return Err(Refusal::generic(format!(
                    "{name:?} cannot be changed while a run lasts; max-bandwidth, max-postcopy-bandwidth and \
                     downtime-limit can"
                )));
            }
        }
    }
    Ok(limits)
}

fn unexpected(arguments: &Map<String, Value>) -> Refusal {
    let names: Vec<_> = arguments.keys().map(String::as_str).collect();
    Refusal::generic(format!("unexpected arguments: {}", names.join(", ")))
}

/// Why a command is not executed, with a class of QMP.
struct Refusal {
    class: &'static str,
    text: String,
}

impl Refusal {
    fn generic(text: String) -> Self {
        Self { class: "GenericError", text }
    }

    fn unknown(text: String) -> Self {
        Self { class: "CommandNotFound", text }
    }

    fn reply(&self) -> Value {
        json!({ "error": { "class": self.class, "desc": self.text } })
    }
}

fn line(value: &Value) -> String {
    format!("{value}\r\n")
}

const NEGOTIATION: &str = "qmp_capabilities";
/// Commands here have a few dozen bytes.
const LONGEST: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn replies(session: &mut Session<'_>, bytes: &[u8]) -> Vec<(Value, Then)> {
        session.receive(bytes);
        std::iter::from_fn(|| session.next_reply())
            .map(|(line, then)| (serde_json::from_str(&line).unwrap(), then))
            .collect()
    }

    #[test]
    fn commands_come_in_pieces_and_together_and_nonsense_ends_the_session() {
        let run = Observed::new("send", "FILE".into(), "unix:x".into());
        let mut session = Session::new(&run);
        let early = replies(&mut session, br#"{"execute": "query-migrate", "id": 7}"#);
        assert_eq!(
            (&early[0].0["error"]["class"], &early[0].0["id"]),
            (&json!("CommandNotFound"), &json!(7))
        );
        assert!(replies(&mut session, br#" {"execute": "qmp_cap"#).is_empty());
        let both = br#"abilities", "arguments": {"enable": []}}{"execute":"query-migrate"}{"execute":"migrate_cancel"}"#;
        let both = replies(&mut session, both);
        assert_eq!((&both[0].0, &both[1].0["return"]["status"]), (&json!({ "return": {} }), &json!("none")));
        assert_eq!((both.len(), both[2].1), (3, Then::Cancel));
        for (request, words) in [
            (r#"[]"#, "expected an object"),
            (r#"{"execute": 1}"#, "expected a command"),
            (r#"{"execute": "stop"}"#, "is not known"),
            (r#"{"execute": "query-migrate", "arguments": {"x": 1}}"#, "unexpected arguments: x"),
            (r#"{"execute": "query-migrate", "more": 1}"#, "\"more\" is unexpected"),
            (
                r#"{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": "1M"}}"#,
                "a whole number",
            ),
            (r#"{"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 2000001}}"#, "2000000"),
            (
                r#"{"execute": "migrate-set-parameters", "arguments": {"multifd-channels": 1}}"#,
                "cannot be changed",
            ),
            (
                r#"{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1}}"#,
                "nothing to adjust",
            ),
        ] {
            let (reply, then) = &replies(&mut session, request.as_bytes())[0];
            let desc = reply["error"]["desc"].as_str().unwrap();
            assert!(desc.contains(words) && *then == Then::Continue, "{request}: {desc}");
        }
        assert_eq!(replies(&mut session, b"\n stop\n")[0].1, Then::Disconnect);
        assert!(replies(&mut session, b" \r\n ").is_empty());
        let long = [&b"{\"execute\": \""[..], &vec![b'x'; LONGEST]].concat();
        assert_eq!(replies(&mut session, &long)[0].1, Then::Disconnect);
    }
}
