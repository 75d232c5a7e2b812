"""Tools around trained models: conversion and sampling. The core never imports them."""
