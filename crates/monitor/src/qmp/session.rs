//! One QMP monitor: greeting, negotiation, commands in and out of band.

use super::framing::{Frame, Framer};
use super::{Class, Command, Error, PACKAGE, VERSION};
use crate::Context;
use crate::context::lock;
use crate::output::Output;
use bus::{CharEvent, CharFrontend, Chardev};
use serde_json::{Map, Value, json};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, Weak};

/// Commands that may wait for execution; then the client's input waits.
const WAITING: usize = 8;

struct Session {
    line: Line,
    state: Mutex<State>,
}

/// What it takes to run commands and answer.
#[derive(Clone)]
struct Line {
    context: Weak<Context>,
    chardev: Arc<dyn Chardev>,
    output: Arc<Output>,
    pretty: bool,
}

#[derive(Default)]
struct State {
    framer: Framer,
    negotiated: bool,
    /// Where commands go when out-of-band ones may overtake them.
    queue: Option<SyncSender<Request>>,
}

struct Request {
    command: &'static Command,
    arguments: Map<String, Value>,
    id: Option<Value>,
}

pub(crate) fn serve(context: &Arc<Context>, chardev: Arc<dyn Chardev>, pretty: bool) -> std::io::Result<()> {
    let output = Output::start(chardev.clone())?;
    let line = Line { context: Arc::downgrade(context), chardev: chardev.clone(), output, pretty };
    chardev.attach(Arc::new(Session { line, state: Mutex::default() }));
    Ok(())
}

impl Drop for Session {
    fn drop(&mut self) {
        self.line.output.close();
    }
}

impl CharFrontend for Session {
    fn receive(&self, data: &[u8]) -> usize {
        let mut frames = Vec::new();
        lock(&self.state).framer.feed(data, |f| frames.push(f));
        for frame in frames {
            match frame {
                Frame::Value(text) => self.message(&text),
                Frame::Bad(why) => self.line.fail(&Error::generic(why), None),
            }
        }
        data.len()
    }

    fn event(&self, event: CharEvent) {
        match event {
            CharEvent::Opened => {
                *lock(&self.state) = State::default();
                let (major, minor, micro) = VERSION;
                self.line.send(&json!({ "QMP": {
                    "version": { "qemu": { "micro": micro, "minor": minor, "major": major }, "package": PACKAGE },
                    "capabilities": ["oob"],
                }}));
            }
            CharEvent::Closed => {
                *lock(&self.state) = State::default();
                self.line.output.discard();
                if let Some(context) = self.line.context.upgrade() {
                    context.remove_session(&self.line.output);
                }
            }
            _ => {}
        }
    }
}

impl Line {
    fn send(&self, value: &Value) {
        let text = if self.pretty { format!("{value:#}\r\n") } else { format!("{value}\r\n") };
        self.output.answer(text.into_bytes());
    }

    fn fail(&self, error: &Error, id: Option<Value>) {
        let mut answer = json!({ "error": { "class": error.class, "desc": error.desc } });
        if let Some(id) = id {
            answer["id"] = id;
        }
        self.send(&answer);
    }

    fn answer(&self, result: super::Result<Value>, id: Option<Value>) {
        match result {
            Ok(value) => {
                let mut answer = Map::new();
                answer.insert("return".into(), value);
                if let Some(id) = id {
                    answer.insert("id".into(), id);
                }
                self.send(&Value::Object(answer));
            }
            Err(error) => self.fail(&error, id),
        }
    }

    fn run(&self, command: &'static Command, arguments: Map<String, Value>, id: Option<Value>) {
        let Some(context) = self.context.upgrade() else { return };
        super::fds::with_session(&self.chardev, || {
            self.answer(command.call(&context, arguments), id);
        });
    }
}

impl Session {
    fn message(&self, text: &[u8]) {
        let value: Value = match serde_json::from_slice(text) {
            Ok(value) => value,
            Err(e) => {
                let why = if e.to_string().starts_with("recursion limit") {
                    "JSON nesting depth limit exceeded".into()
                } else {
                    format!("JSON parse error, {e}")
                };
                return self.line.fail(&Error::generic(why), None);
            }
        };
        let Value::Object(mut object) = value else {
            return self.line.fail(&Error::generic("QMP input must be a JSON object"), None);
        };
        let id = object.remove("id");
        match self.request(object) {
            Ok((command, arguments, oob)) => self.dispatch(command, arguments, id, oob),
            Err(error) => self.line.fail(&error, id),
        }
    }

    fn request(&self, mut object: Map<String, Value>) -> super::Result<(String, Map<String, Value>, bool)> {
        let oob_enabled = lock(&self.state).queue.is_some();
        let (name, oob) = match (object.remove("execute"), object.remove("exec-oob")) {
            (Some(_), Some(_)) => {
                return Err(Error::generic("QMP input member 'exec-oob' clashes with 'execute'"));
            }
            (Some(name), None) => (name, false),
            (None, Some(_)) if !oob_enabled => {
                return Err(Error::generic("QMP input member 'exec-oob' is unexpected"));
            }
            (None, Some(name)) => (name, true),
            (None, None) => return Err(Error::generic("QMP input lacks member 'execute'")),
        };
        let Value::String(name) = name else {
            return Err(Error::generic("QMP input member 'execute' must be a string"));
        };
        let arguments = match object.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Error::generic("QMP input member 'arguments' must be an object")),
        };
        match object.keys().next() {
            Some(other) => Err(Error::generic(format!("QMP input member '{other}' is unexpected"))),
            None => Ok((name, arguments, oob)),
        }
    }

    fn dispatch(&self, name: String, arguments: Map<String, Value>, id: Option<Value>, oob: bool) {
        let negotiated = lock(&self.state).negotiated;
        if name == "qmp_capabilities" {
            let result = if negotiated {
                Err(Error::of(
                    Class::CommandNotFound,
                    "Capabilities negotiation is already complete, command ignored",
                ))
            } else {
                self.negotiate(&arguments)
            };
            return self.line.answer(result, id);
        }
        if !negotiated {
            let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return self.line.fail(&Error::of(Class::CommandNotFound, desc), id);
        }
        let Some(command) = super::find(&name) else {
            let desc = format!("The command {name} has not been found");
            return self.line.fail(&Error::of(Class::CommandNotFound, desc), id);
        };
        if oob && !command.oob {
            return self.line.fail(&Error::generic(format!("The command {name} does not support OOB")), id);
        }
        let queue = if oob { None } else { lock(&self.state).queue.clone() };
        match queue {
            // A full queue holds up the client, and with it its out-of-band commands: it was told how many may wait.
            Some(queue) => {
                // The receiving thread lives as long as the queue is known here.
                let _ = queue.send(Request { command, arguments, id });
            }
            None => self.line.run(command, arguments, id),
        }
    }

    fn negotiate(&self, arguments: &Map<String, Value>) -> super::Result<Value> {
        let mut oob = false;
        for (key, value) in arguments {
            if key != "enable" {
                return Err(Error::generic(format!("Parameter '{key}' is unexpected")));
            }
            let wrong = || Error::generic("Invalid parameter type for 'enable', expected: array");
            for capability in value.as_array().ok_or_else(wrong)? {
                match capability.as_str() {
                    Some("oob") => oob = true,
                    _ => {
                        return Err(Error::generic(format!(
                            "Parameter 'enable' does not accept value {capability}"
                        )));
                    }
                }
            }
        }
        let queue = if oob { Some(self.start_queue()?) } else { None };
        {
            let mut state = lock(&self.state);
            state.negotiated = true;
            state.queue = queue;
        }
        if let Some(context) = self.line.context.upgrade() {
            context.add_session(&self.line.output);
        }
        Ok(json!({}))
    }

    /// The thread that runs commands in order while out-of-band ones pass them. It ends with the queue.
    fn start_queue(&self) -> super::Result<SyncSender<Request>> {
        let (sender, receiver) = sync_channel::<Request>(WAITING);
        let line = self.line.clone();
        std::thread::Builder::new()
            .name("qmp".into())
            .stack_size(1 << 20)
            .spawn(move || {
                for r in receiver {
                    line.run(r.command, r.arguments, r.id);
                }
            })
            .map_err(|e| Error::generic(format!("cannot start a thread: {e}")))?;
        Ok(sender)
    }
}
