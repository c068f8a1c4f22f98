//! Who is woken when the inner channel can go on.
//!
//! A channel wakes one task per direction, but both directions of a WebSocket use both of the inner channel: a reader
//! sends pongs, a closing writer reads. So the inner channel wakes one of two groups, and the group its tasks.

use parking_lot::Mutex;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

/// What a task does on the WebSocket.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role {
    Reader = 0,
    Writer = 1,
}

/// The tasks that wait for one direction of the inner channel.
#[derive(Debug, Default)]
struct Group(Mutex<[Option<Waker>; 2]>);

impl Group {
    fn wake_all(&self) {
        let tasks = std::mem::take(&mut *self.0.lock());
        tasks.into_iter().flatten().for_each(Waker::wake);
    }

    fn join(&self, role: Role, cx: &Context<'_>) {
        match &mut self.0.lock()[role as usize] {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
    }
}

impl Wake for Group {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_all();
    }
}

#[derive(Debug)]
struct Side {
    group: Arc<Group>,
    waker: Waker,
}

impl Default for Side {
    fn default() -> Self {
        let group = Arc::new(Group::default());
        Self { waker: group.clone().into(), group }
    }
}

/// The tasks that wait for the inner channel.
#[derive(Debug, Default)]
pub(super) struct Wakers {
    readable: Side,
    writable: Side,
}

impl Wakers {
    /// For polls that read the inner channel.
    pub fn readable(&self, role: Role, cx: &Context<'_>) -> Context<'_> {
        self.readable.group.join(role, cx);
        Context::from_waker(&self.readable.waker)
    }

    /// For polls that write to it.
    pub fn writable(&self, role: Role, cx: &Context<'_>) -> Context<'_> {
        self.writable.group.join(role, cx);
        Context::from_waker(&self.writable.waker)
    }

    /// Wakes all, to look at what they should send.
    pub fn wake_all(&self) {
        self.readable.group.wake_all();
        self.writable.group.wake_all();
    }
}
