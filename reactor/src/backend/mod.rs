//! Production backend (see the room's page).
