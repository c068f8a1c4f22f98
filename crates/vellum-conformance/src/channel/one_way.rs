//! Channels that carry bytes from one end to the other and not back: pipes, and children of which one stream is used.

use super::{Carries, End, Needs, Subject, blocking, case, soon};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use tokio::io::AsyncWriteExt;
use vellum_channel::{Blocking, ChannelExt, ErrorKind, Interest, kind_of};

pub(super) fn cases(subject: &Subject) {
    debug_assert_eq!(subject.traits.carries, Carries::OneWay);
    case(subject, Needs::NearToFar, "the other direction", other_direction);
    case(subject, Needs::NearToFar, "waiting for the other direction", waiting_for_the_other_direction);
    if subject.traits.delivers_when_dropped {
        case(subject, Needs::NearToFar, "the reader goes away", reader_goes_away);
    }
    blocking::case(subject, Needs::NearToFar, "the other direction", other_direction_of_threads);
}

fn assert_refused<T: std::fmt::Debug>(what: &str, refused: io::Result<T>) {
    let error = refused.expect_err(what);
    assert_eq!(kind_of(&error), Some(ErrorKind::Unsupported), "{what}: {error}");
}

/// Is refused at once, and nothing of the one that there is gets lost.
async fn other_direction(mut near: End, mut far: End) {
    for is_blocking in [true, false] {
        near.set_blocking(is_blocking);
        far.set_blocking(is_blocking);
        near.write_all(b"there").await.expect("written");
        assert_refused("read from the writing end", near.readv(&mut [IoSliceMut::new(&mut [0; 4])]).await);
        assert_refused("a read of all", near.read_all(&mut [0; 4]).await);
        assert_refused("written to the reading end", far.writev(&[IoSlice::new(b"back")]).await);
        assert_refused("a write of all", far.writev_all(&[IoSlice::new(b"back")]).await);
        let mut room = [0; 5];
        far.read_all(&mut room).await.expect("read");
        assert_eq!(room, *b"there");
    }
}

/// A direction that is not there is never the one that is ready, and is not waited for in vain.
async fn waiting_for_the_other_direction(mut near: End, mut far: End) {
    assert_refused("a wait to read at the writing end", soon("an answer", near.ready(Interest::READ)).await);
    assert_refused("a wait to write at the reading end", soon("an answer", far.ready(Interest::WRITE)).await);
    let found = soon("writable", near.ready(Interest::all())).await;
    assert_eq!(found.expect("no error"), Interest::WRITE);
    near.write_all(b"x").await.expect("written");
    let found = soon("readable", far.ready(Interest::all())).await;
    assert_eq!(found.expect("no error"), Interest::READ);
}

/// The writer is told: by an error, and before by no longer having to wait.
async fn reader_goes_away(mut near: End, far: End) {
    near.write_all(b"unread").await.expect("written");
    drop(far);
    let writing = async {
        loop {
            near.write_all(&[0; 65_536]).await?;
        }
    };
    let error: io::Result<()> = soon("an error of writing", writing).await;
    assert_eq!(error.expect_err("nobody reads any more").kind(), io::ErrorKind::BrokenPipe);
    let found = soon("writable", near.ready(Interest::WRITE)).await.expect("no error");
    assert_eq!(found, Interest::WRITE);
}

fn other_direction_of_threads(mut near: Blocking<End>, mut far: Blocking<End>) {
    assert_refused("read from the writing end", near.read(&mut [0; 4]));
    assert_refused("written to the reading end", far.write(b"back"));
    assert_refused("a wait to read at the writing end", near.wait(Interest::READ));
    near.write_all(b"there").expect("written");
    let mut room = [0; 5];
    far.read_all(&mut room).expect("read");
    assert_eq!(room, *b"there");
}
