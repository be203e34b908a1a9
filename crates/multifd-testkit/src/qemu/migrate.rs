//! The migration commands and queries of a test, for either end.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Error, Vm, wait_for};

impl Vm {
    /// Switches migration capabilities on or off.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn set_capabilities(&mut self, capabilities: &[(&str, bool)]) -> Result<(), Error> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(capability, state)| json!({ "capability": capability, "state": state }))
            .collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
    }

    /// Sets migration parameters, an object named as in `migrate-set-parameters`.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn set_parameters(&mut self, parameters: Value) -> Result<(), Error> {
        self.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// Switches multifd on with this many channels; 0 switches it off.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn set_multifd_channels(&mut self, channels: u8) -> Result<(), Error> {
        self.set_capabilities(&[("multifd", channels > 0)])?;
        if channels > 0 { self.set_parameters(json!({ "multifd-channels": channels })) } else { Ok(()) }
    }

    /// Starts a migration to `address`, in QEMU's form: `tcp:HOST:PORT`, `unix:PATH`, `file:PATH`, …
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn migrate(&mut self, address: &str) -> Result<(), Error> {
        self.execute("migrate", json!({ "uri": address })).map(drop)
    }

    /// Starts to listen on `address`, or to load the file it names. Returns the address with the real port.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn migrate_incoming(&mut self, address: &str) -> Result<String, Error> {
        self.execute("migrate-incoming", json!({ "uri": address }))?;
        if !address.starts_with("tcp:") {
            return Ok(address.to_owned());
        }
        let answer = self.query_migrate()?;
        let place = &answer["socket-address"][0];
        match (place["host"].as_str(), place["port"].as_str()) {
            (Some(host), Some(port)) if host.contains(':') => Ok(format!("tcp:[{host}]:{port}")),
            (Some(host), Some(port)) => Ok(format!("tcp:{host}:{port}")),
            _ => Err(Error::Unmet(format!("expected a socket-address, found {answer}"))),
        }
    }

    /// The result of `query-migrate`.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn query_migrate(&mut self) -> Result<Value, Error> {
        self.execute("query-migrate", Value::Object(Map::new()))
    }

    /// Waits until the migration is in the state `status`, and returns the result of `query-migrate`.
    ///
    /// # Errors
    ///
    /// When it ends in another state, does not reach the state in time, or QEMU has ended.
    pub fn wait_migration(&mut self, status: &str, patience: Duration) -> Result<Value, Error> {
        self.wait_migration_in(&[status], patience)
    }

    /// Waits until the migration is in one of these states.
    fn wait_migration_in(&mut self, states: &[&str], patience: Duration) -> Result<Value, Error> {
        let mut last = Value::Null;
        let what = format!("migration status {} on QEMU {}", states.join(" or "), self.series());
        wait_for(&what, patience, || {
            last = self.query_migrate()?;
            match last["status"].as_str() {
                Some(found) if states.contains(&found) => Ok(Some(last.clone())),
                Some("completed" | "failed" | "cancelled") => {
                    Err(Error::Unmet(format!("expected {what}, found {last}")))
                }
                _ => Ok(None),
            }
        })
        .map_err(|error| {
            let error = self.explain(error);
            error.with(&format!("\n  query-migrate: {last}"))
        })
    }

    /// Cancels the migration, and waits until it has ended: as `cancelled`, or as `failed` when QEMU notices first that
    /// it cannot write to the connection which its own cancel has shut down (3 of 120 cancels of QEMU 10.0 on a busy
    /// machine).
    ///
    /// # Errors
    ///
    /// When it completes, does not end in time, or QEMU has ended.
    pub fn cancel_migration(&mut self, patience: Duration) -> Result<(), Error> {
        self.execute("migrate_cancel", json!({}))?;
        self.wait_migration_in(&["cancelled", "failed"], patience).map(drop)
    }

    /// Waits until the source has begun at least this many passes (`dirty-sync-count`), or has completed.
    ///
    /// # Errors
    ///
    /// When it fails or does not get there in time, or QEMU has ended.
    pub fn wait_passes(&mut self, passes: u64, patience: Duration) -> Result<(), Error> {
        let what = format!("{passes} passes of QEMU {}", self.series());
        wait_for(&what, patience, || {
            let told = self.query_migrate()?;
            match told["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed" | "cancelled") => Err(Error::Unmet(format!("expected {what}, found {told}"))),
                _ => Ok((told["ram"]["dirty-sync-count"].as_u64() >= Some(passes)).then_some(())),
            }
        })
        .map_err(|error| self.explain(error))
    }

    /// Waits until the guest is in the state `state`, with QEMU's names (`running`, `postmigrate`, …).
    ///
    /// # Errors
    ///
    /// When it does not reach the state in time, or QEMU has ended.
    pub fn wait_run_state(&mut self, state: &str, patience: Duration) -> Result<(), Error> {
        wait_for(&format!("state {state} of the guest"), patience, || {
            Ok((self.run_state()? == state).then_some(()))
        })
        .map_err(|error| self.explain(error))
    }
}
